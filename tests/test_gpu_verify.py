"""lococo-verify and lococo-bench on a GPU. scripts/gpu_host makes what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GOLDEN_NAMES, GPU_BUNDLES, unpack_golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU_BUNDLES, reason="LOCOCO_GPU_BUNDLES is not set: run scripts/gpu_host, which makes engines"
    ),
]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_engines_agree_with_pytorch_on_the_same_gpu(name: str, tmp_path: Path) -> None:
    from lococo_runtime import Session

    from lococo_export import load_checkpoint
    from lococo_export.reference import ReferenceModel
    from lococo_export.verify import perplexities, verify_bundle

    case = unpack_golden(name, tmp_path / name)
    reference = ReferenceModel(load_checkpoint(case.path, **case.load_args), device="cuda:0")
    ids = [int(i) % reference.geometry.vocab_size for i in range(7, 7 + 400)]
    with Session(Path(GPU_BUNDLES) / name, device="cuda:0", backend="tensorrt") as session:
        report = verify_bundle(session, reference, ids, 120)
        assert report.agrees, str(report)
        assert report.fusions > 5
        ours, theirs = perplexities(session, reference, ids)
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_cuda_graphs_of_the_reference_are_its_steps(tmp_path: Path) -> None:
    import torch

    from lococo_export import load_checkpoint
    from lococo_export.reference import ReferenceModel, ReferenceSession
    from lococo_export.verify import _Follower

    case = unpack_golden(GOLDEN_NAMES[0], tmp_path / "checkpoint")
    model = ReferenceModel(load_checkpoint(case.path, **case.load_args), device="cuda:0")
    follower, session = _Follower(model), ReferenceSession(model)
    with torch.inference_mode():
        for token in range(5, 105):
            result = follower.read([token])
            follower.update(result)
            torch.testing.assert_close(result.logits[:, -1], session.step(token))
    assert follower.length == session.live_slots
    torch.testing.assert_close(follower.state.keys[0], session.state.keys[0])


def test_compiled_reference_steps_are_its_steps(tmp_path: Path) -> None:
    """By Inductor, layer by layer, each step a CUDA graph: what --against reference-compile measures."""
    import torch
    from lococo_bench.against import _ReferenceSteps

    from lococo_export import load_checkpoint
    from lococo_export.reference import ReferenceModel, ReferenceSession

    case = unpack_golden(GOLDEN_NAMES[0], tmp_path / "checkpoint")
    model = ReferenceModel(load_checkpoint(case.path, **case.load_args), device="cuda:0")
    with torch.no_grad():
        steps, session = _ReferenceSteps(torch, model, True), ReferenceSession(model)
        steps.start(0)
        token = 0
        for _ in range(100):
            steps()
            token = int(session.step(token).argmax())
            assert int(steps.ids) == token
    assert set(steps.graphs) == {False, True}
    torch.testing.assert_close(steps.state.keys[0], session.state.keys[0])


def test_bench_measures_a_gpu() -> None:
    from lococo_bench import Bench, Plan

    with Bench(Path(GPU_BUNDLES) / GOLDEN_NAMES[0], device="cuda:0", backend="tensorrt") as bench:
        rows = list(bench.run(Plan((40,), (34,), (0, 1 << 20), 2, "position")))
    assert len(rows) == 4
    for row in rows:
        assert row["gpu_info"]
        assert row["tensorrt_version"]
        assert row["peak_memory_bytes"] > 0
        assert row["copy_bytes_per_second"] > 1e10
    assert rows[1]["device_used_bytes"] == rows[3]["device_used_bytes"]
