"""ONNX Runtime's CUDA provider: golden answers, states, memory. scripts/gpu_host makes the bundles."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from bundles import export_golden
from conftest import CUDA, GOLDEN_NAMES, GPU_BUNDLES, GoldenCase, full_device, has_cuda_provider, unpack_golden
from lococo_runtime import (
    LococoError,
    Model,
    OutOfMemoryError,
    SamplingParams,
    Session,
    UnsupportedError,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU_BUNDLES, reason="LOCOCO_GPU_BUNDLES is not set: run scripts/gpu_host, which makes them"),
    pytest.mark.skipif(not has_cuda_provider(), reason="no CUDA provider beside ONNX Runtime: set LOCOCO_ONNXRUNTIME"),
]
BUNDLES = Path(GPU_BUNDLES)
RANDOM_NAMES = ["accumulated", "accumulated_fp16", "aging"]
HEADER = 88  # bytes of a state's header


@functools.cache
def gpu_model(name: str) -> Model:
    """Opened once; CUDA's libraries take a while."""
    return Model(BUNDLES / name, **CUDA)


def text(session: Session, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, session.model.vocab_size, n)


def payload(state: bytes) -> np.ndarray:
    """The numbers of a float32 bundle's state, less position, length and counts."""
    return np.frombuffer(state[HEADER + 16 :], np.float32)


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    return unpack_golden(request.param, tmp_path_factory.mktemp("golden") / request.param)


def test_golden_logits_and_greedy_tokens(case: GoldenCase) -> None:
    next_ids = [*case.io["decode_input_ids"][0].tolist(), int(case.io["decode_next_id_after_last"][0])]
    with Session(gpu_model(case.name)) as session:
        logits = session.prefill(case.io["input_ids"][0], return_all=True)
        np.testing.assert_allclose(logits, case.io["prefill_logits"][0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(session.logits(), logits[-1], rtol=0, atol=1e-4)
        worst = 0.0
        for step, expected in enumerate(case.io["decode_logits"][0]):
            assert session.sample() == next_ids[step]
            worst = max(worst, float(np.abs(session.step(next_ids[step]) - expected).max()))
        assert session.sample() == next_ids[-1]
        print(f"{case.name}: worst logit error {worst:.2e}")
        assert worst <= 1e-3


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_it_follows_the_cpu(name: str) -> None:
    """Forwards of every width, each from the CPU's state: the same logits, and in float32 the same state.

    In float16 a fusion may choose another one of two slots whose scores differ by rounding.
    """
    half = name.endswith("fp16")
    with Session(gpu_model(name)) as gpu, Session(BUNDLES / name) as cpu:
        for seed, n in enumerate([1, 40, 23, 40, *[1] * 20, 40, 33, *[1] * 20]):
            ids = text(gpu, n, seed)
            gpu.set_state(cpu.state())
            ours, theirs = gpu.prefill(ids, return_all=True), cpu.prefill(ids, return_all=True)
            if half:
                norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
                assert ((ours * theirs).sum(-1) / norms).min() > 0.999
            else:
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
                np.testing.assert_allclose(payload(gpu.state()), payload(cpu.state()), rtol=0, atol=1e-3)
            assert (gpu.position, gpu.live_slots) == (cpu.position, cpu.live_slots)
        assert cpu.counters["fusions"] > 8


@pytest.mark.parametrize("name", [*GOLDEN_NAMES, "accumulated"])
def test_a_state_moves_between_cpu_and_gpu(name: str, tmp_path: Path) -> None:
    """Read on one, saved, loaded on the other, continued on both: the same tokens, logits and states."""
    with Session(gpu_model(name)) as gpu, Session(BUNDLES / name) as cpu:
        for start, goes_on in ((cpu, gpu), (gpu, cpu)):
            start.reset()
            start.prefill(text(start, 107))
            start.save(tmp_path / "state")
            goes_on.load(tmp_path / "state")
            assert goes_on.state() == start.state()
            np.testing.assert_array_equal(start.logits(), goes_on.logits())
            for _ in range(60):
                token = start.sample()
                assert goes_on.sample() == token
                np.testing.assert_allclose(goes_on.step(token), start.step(token), rtol=0, atol=1e-3)
            assert (start.position, start.live_slots) == (goes_on.position, goes_on.live_slots)
            np.testing.assert_allclose(payload(start.state()), payload(goes_on.state()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["c1_baseline", *RANDOM_NAMES])
def test_a_state_moves_to_tensorrt_and_back(name: str) -> None:
    try:
        model = Model(BUNDLES / name, device="cuda:0", backend="tensorrt")
    except LococoError as e:
        pytest.skip(f"no TensorRT here: {e}")
    with model, Session(gpu_model(name)) as ours, Session(model) as tensorrt, Session(BUNDLES / name) as cpu:
        cpu.prefill(text(cpu, 107))
        tensorrt.set_state(cpu.state())
        ours.set_state(tensorrt.state())
        assert ours.state() == cpu.state()
        ours.prefill(text(cpu, 50, seed=1))
        tensorrt.set_state(ours.state())
        assert tensorrt.state() == ours.state()
        np.testing.assert_array_equal(tensorrt.logits(), ours.logits())


@pytest.mark.parametrize("name", ["c1_baseline", *RANDOM_NAMES])
@pytest.mark.parametrize("prompt", [1, 31, 47, 100])
def test_save_load_clone_are_bit_exact(name: str, prompt: int, tmp_path: Path) -> None:
    with Session(gpu_model(name)) as session, Session(gpu_model(name)) as other:
        session.prefill(text(session, prompt))
        session.save(tmp_path / "state")
        other.prefill(text(session, 90, seed=9))  # what it held before must not shine through
        other.load(tmp_path / "state")
        with session.clone() as clone:
            tail = text(session, 130, seed=1)
            for each in (session, other, clone):
                each.prefill(tail[:77])
                for token in tail[77:]:
                    each.step(int(token))
            assert session.state() == other.state() == clone.state()


def test_device_memory_is_flat_to_the_byte() -> None:
    torch = pytest.importorskip("torch", reason="torch is missing: it asks for the device's free memory")
    with Session(gpu_model("c1_baseline")) as session:

        def work(blocks: int, tokens: int) -> None:
            session.prefill(text(session, blocks * 32 + 1))
            session.generate_all([], SamplingParams(max_tokens=tokens, ignore_eos=True))
            session.prefill(text(session, 40), return_all=True)

        work(5, 100)
        before = torch.cuda.mem_get_info()[0]
        work(300, 1000)
        assert torch.cuda.mem_get_info()[0] == before


def test_the_callers_device_stays() -> None:
    torch = pytest.importorskip("torch", reason="torch is missing: it has a current device")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    with torch.cuda.device(1), Session(gpu_model("c1_baseline")) as session:
        session.prefill(text(session, 50))
        assert torch.cuda.current_device() == 1


def test_a_model_that_does_not_fit_is_refused() -> None:
    with full_device(), pytest.raises(OutOfMemoryError):
        Model(BUNDLES / "wide", **CUDA)
    with Session(BUNDLES / "wide", **CUDA) as session:
        assert session.prefill([5, 6, 7]).shape == (60000,)


def test_bfloat16_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    bundle = export_golden("c1_baseline", tmp_path / "bfloat16", dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r'cuda:0 .*got bfloat16: .*another dtype, or use backend "tensorrt"'):
        Session(bundle, **CUDA)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UnsupportedError, match="cuda:99"):
        Session(BUNDLES / "c1_baseline", device="cuda:99", backend="onnxruntime")
