"""Checkpoint to bundle to session: the whole way, against the golden cases and transformers."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import export_golden
from conftest import Backend, GoldenCase
from lococo_runtime import (
    CheckpointError,
    InvalidArgumentError,
    NoSpaceError,
    Session,
    StorageError,
    TargetExistsError,
    UnsupportedError,
)
from lococo_runtime.bundle import LococoConfig, forward_widths, read_manifest, sha256_file
from tiny_models import VARIANTS, edit_tensors, make_model, random_heads

from lococo_export import export_bundle, load_checkpoint
from lococo_export.checkpoints import save_heads
from lococo_export.reference import ReferenceModel
from lococo_export.verify import verify_bundle


@pytest.fixture(scope="session")
def golden_bundle(golden: GoldenCase, cpu: Backend) -> Path:
    return cpu.bundle(golden.name)


def test_golden_logits_and_greedy_tokens(golden: GoldenCase, golden_bundle: Path) -> None:
    atol = 1e-3 if golden.saturated else 1e-4
    next_ids = np.concatenate(
        [golden.io["decode_input_ids"], golden.io["decode_next_id_after_last"][:, None]], axis=1
    )  # (B, S + 1): greedy after the prefill, then after every step
    for row, ids in enumerate(golden.io["input_ids"]):
        with Session(golden_bundle) as session:
            logits, done = [], 0
            for n in golden.chunk_lens:
                logits.append(session.prefill(ids[done : done + n], return_all=True))
                done += n
            np.testing.assert_allclose(np.concatenate(logits), golden.io["prefill_logits"][row], rtol=0, atol=atol)
            token = int(session.logits().argmax())
            for step, expected in enumerate(golden.io["decode_logits"][row]):
                assert token == next_ids[row, step]
                out = session.step(token)
                np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
                token = int(out.argmax())
            assert token == next_ids[row, -1]


def test_prefill_cuts_blocks_itself(golden: GoldenCase, golden_bundle: Path) -> None:
    """One call gives what forwards of block_size give: the cases' chunks are blocks, the last one maybe partial."""
    ids = golden.io["input_ids"][0]
    with Session(golden_bundle) as session:
        logits = session.prefill(ids, return_all=True)
        assert session.position == len(ids)
        assert session.live_slots <= session.model.manifest.cache.capacity
        np.testing.assert_allclose(
            logits, golden.io["prefill_logits"][0], rtol=0, atol=1e-3 if golden.saturated else 1e-4
        )
        np.testing.assert_allclose(session.logits(), logits[-1], rtol=0, atol=1e-5)  # another order of summation


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_logits_for_every_variant(name: str, tmp_path: Path) -> None:
    """A cache larger than the text: the bundle is the model itself."""
    family, changes = VARIANTS[name]
    model = make_model(tmp_path / "model", family, **changes)
    checkpoint = load_checkpoint(tmp_path / "model", policy="h2o", mem_size=96, block_size=40)
    export_bundle(checkpoint, tmp_path / "bundle")
    ids = torch.randint(0, checkpoint.geometry.vocab_size, (90,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0].numpy()
    with Session(tmp_path / "bundle") as session:
        ours = [session.prefill(ids[:70].numpy(), return_all=True)]  # a block, a short block
        ours += [session.step(int(i))[None] for i in ids[70:]]
    np.testing.assert_allclose(np.concatenate(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", [0, 2_047, 2_048, 1_048_575, 2**31 - 1])
def test_rotary_angles_in_the_graph_at_far_positions(golden: GoldenCase, golden_bundle: Path, position: int) -> None:
    """The key of the first layer depends on nothing but the token and its angle; against float64 angles."""
    manifest = read_manifest(golden_bundle)
    spec = next(g for g in manifest.graphs if g.name == "decoder_1")
    feed = {t.name: np.zeros(t.shape, t.dtype) for t in spec.inputs}
    feed["input_ids"][:] = 5
    feed["position_ids"][:] = position
    session = onnxruntime.InferenceSession(golden_bundle / spec.file, providers=["CPUExecutionProvider"])
    key = session.run(["new_key_values.0.key"], feed)[0]  # (1, H, 1, d)

    model = ReferenceModel(load_checkpoint(golden.path, **golden.load_args), torch.float64)
    state = dataclasses.replace(model.empty_state(), position=torch.tensor([position]))
    with torch.inference_mode():
        expected = model(torch.tensor([[5]]), state).new_keys[0].numpy()
    # an angle off by 1e-4 rad moves a component by 1e-4 of the pair's length
    np.testing.assert_allclose(key, expected, rtol=0, atol=1e-4 * np.abs(expected).max() / 4)


def test_manifest_describes_the_graphs(golden_bundle: Path) -> None:
    manifest = read_manifest(golden_bundle)
    widths = forward_widths(manifest.cache.block_size)
    assert [g.tokens for g in manifest.graphs if g.kind == "decoder"] == list(widths)
    for spec in manifest.graphs:
        model = onnx.load(golden_bundle / spec.file, load_external_data=False)
        onnx.checker.check_model(str(golden_bundle / spec.file), full_check=True)
        for ours, theirs in ((spec.inputs, model.graph.input), (spec.outputs, model.graph.output)):
            shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in theirs}
            assert shapes == {t.name: t.shape for t in ours}
        assert {i.version for i in model.opset_import if i.domain == ""} == {17}
        for initializer in model.graph.initializer:  # weights are stored once, outside
            location = {e.key: e.value for e in initializer.external_data}["location"]
            assert location == "model.onnx.data"
    functions = {f.name for f in model.functions} | {
        f.name for f in onnx.load(golden_bundle / "decoder_1.onnx", load_external_data=False).functions
    }
    assert {"RMSNorm", "RotateHalf", "SlotAttention"} <= functions
    assert [f.name for f in onnx.load(golden_bundle / "fusion_1.onnx", load_external_data=False).functions] == [
        "SlotFusion"
    ]
    for entry in manifest.files:
        assert (golden_bundle / entry.path).stat().st_size == entry.nbytes
        assert sha256_file(golden_bundle / entry.path) == entry.sha256


def test_export_repeats_to_the_byte(golden: GoldenCase, golden_bundle: Path, tmp_path: Path) -> None:
    export_golden(golden.name, tmp_path / "again")
    names = sorted(p.name for p in golden_bundle.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (golden_bundle / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0, "local_len": 0},
        {"keep": 20, "local_len": 20},
        {"keep": 12, "local_len": 5, "buffer": 0, "block_size": 7},
        {"keep": 12, "local_len": 5, "buffer": 3, "block_size": 50},
        {"keep": 31, "local_len": 3, "block_size": 1},
        {"keep": 12, "activation": "none", "score_decay": 1.0},
        {"keep": 12, "activation": "gelu", "score_decay": 0.5, "num_conv_layers": 2, "local_len": 4},
        {"keep": 12, "activation": "none", "score_decay": 0.9, "decay_per": "token", "local_len": 4},
        {"keep": 12, "activation": "tanh", "num_conv_layers": 3, "conv_expand": 2, "kernel_size": 1},
    ],
    ids=str,
)
def test_settings_agree_with_the_reference(settings: dict[str, object], tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3")
    config = LococoConfig(**{"mem_size": 32, "block_size": 24, "kernel_size": 5, **settings})  # type: ignore[arg-type]
    geometry = load_checkpoint(tmp_path / "model", policy="h2o", mem_size=32).geometry
    save_heads(tmp_path / "model", config, random_heads(geometry, config))
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config == config
    export_bundle(checkpoint, tmp_path / "bundle")
    ids = np.random.default_rng(1).integers(0, geometry.vocab_size, 400).tolist()
    with Session(tmp_path / "bundle") as session:
        report = verify_bundle(session, ReferenceModel(checkpoint), ids, steps=110)
    assert report.divergence is None, str(report)
    assert report.fusions >= 10
    assert report.logits_max_abs < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_state(dtype: str, golden: GoldenCase, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(golden.path, **golden.load_args)
    full = export_bundle(checkpoint, tmp_path / "full")
    half = export_bundle(checkpoint, tmp_path / "half", dtype=dtype)
    assert full.bundle_id != half.bundle_id
    cache = lambda m: sum(t.nbytes for t in m.state if t.name.startswith("past_key_values"))  # noqa: E731
    assert cache(full) == 2 * cache(half)


def test_float16_session_follows_float32(golden: GoldenCase, tmp_path: Path) -> None:
    export_golden(golden.name, tmp_path / "half", dtype="float16")
    ids = golden.io["input_ids"][0]
    first = golden.chunk_lens[0]  # before any fusion: selections may differ afterwards
    with Session(tmp_path / "half") as session:
        logits = session.prefill(ids[:first], return_all=True)
    expected = golden.io["prefill_logits"][0][:first]
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.999


def test_bfloat16_is_refused_where_onnx_runtime_has_no_kernels(golden: GoldenCase, tmp_path: Path) -> None:
    bundle = export_golden(golden.name, tmp_path / "half", dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r"this CPU \(float32 always does\), got bfloat16: .*another dtype$"):
        Session(bundle)


@pytest.mark.skipif("LOCOCO_LARGE_TESTS" not in os.environ, reason="LOCOCO_LARGE_TESTS=1 runs it: 6 GB of disk")
def test_model_over_two_gigabytes(tmp_path: Path) -> None:
    """Weights beyond protobuf's 2 GB limit and beyond 32-bit offsets."""
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "vocab_size": 120_000}
    model = make_model(tmp_path / "model", "llama", num_attention_heads=16, head_dim=128, **large)
    export_bundle(load_checkpoint(tmp_path / "model", policy="h2o", mem_size=64), tmp_path / "bundle")
    assert (tmp_path / "bundle" / "model.onnx.data").stat().st_size > 2**32
    ids = [5, 100_000, 7]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    with Session(tmp_path / "bundle") as session:
        session.prefill(ids[:2])
        np.testing.assert_allclose(session.step(ids[2]), expected, rtol=0, atol=1e-3)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_existing_target_is_kept_without_force(golden: GoldenCase, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(golden.path, **golden.load_args)
    export_bundle(checkpoint, tmp_path / "bundle")
    before = (tmp_path / "bundle" / "lococo.json").read_bytes()
    with pytest.raises(TargetExistsError, match="--force"):
        export_bundle(checkpoint, tmp_path / "bundle", dtype="float16")
    assert (tmp_path / "bundle" / "lococo.json").read_bytes() == before
    export_bundle(checkpoint, tmp_path / "bundle", dtype="float16", force=True)
    assert read_manifest(tmp_path / "bundle").dtype == "float16"
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["bundle"]


def test_force_never_replaces_something_else(golden: GoldenCase, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    checkpoint = load_checkpoint(golden.path, **golden.load_args)
    with pytest.raises(TargetExistsError, match=r"no lococo\.json"):
        export_bundle(checkpoint, tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_full_disk_leaves_nothing(golden: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match="no space left"):
        export_bundle(load_checkpoint(golden.path, **golden.load_args), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["/proc/bundle", "/dev/null/bundle"])
def test_target_that_cannot_be_written(golden: GoldenCase, target: str) -> None:
    with pytest.raises(StorageError, match=re.escape(target)):
        export_bundle(load_checkpoint(golden.path, **golden.load_args), target)


def test_overflow_is_named(golden: GoldenCase, tmp_path: Path) -> None:
    shutil.copytree(golden.path, tmp_path / "big")
    weight = load_checkpoint(golden.path, **golden.load_args).tensors["model.layers.1.mlp.up_proj.weight"]
    weight[3, 4] = 1e6
    edit_tensors(tmp_path / "big", {"model.layers.1.mlp.up_proj.weight": weight})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*overflow float16"):
        export_bundle(load_checkpoint(tmp_path / "big", **golden.load_args), tmp_path / "bundle", dtype="float16")
    assert not (tmp_path / "bundle").exists()


def test_unknown_dtype(golden: GoldenCase, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="float32, float16, bfloat16"):
        export_bundle(load_checkpoint(golden.path, **golden.load_args), tmp_path / "bundle", dtype="int8")
