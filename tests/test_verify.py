"""lococo-verify: what it forgives, what it finds, and what it blames."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lococo_bench.measure import at_position
from lococo_runtime import InvalidArgumentError, LococoConfig, NotFoundError, Session
from safetensors.torch import load_file
from tiny_models import edit_tensors, make_model, random_heads, small_cache

from lococo_export import export_bundle, load_checkpoint
from lococo_export.checkpoints import Checkpoint, save_heads
from lococo_export.cli import verify_main
from lococo_export.reference import FusedSlots, ReferenceModel, ReferenceSession, fuse_slots, select
from lococo_export.selection import taken_selection
from lococo_export.verify import Divergence, Report, Tolerance, dump_forward, perplexities, verify_bundle

STEPS = 40


def make_lococo(path: Path, **changes: Any) -> Checkpoint:
    make_model(path, num_hidden_layers=3, **changes)
    geometry = load_checkpoint(path, policy="h2o", mem_size=12).geometry
    save_heads(path, small_cache(), random_heads(geometry, small_cache()))
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_lococo(tmp_path_factory.mktemp("verify") / "tiny")


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("verify") / "bundle"
    export_bundle(checkpoint, target)
    return target


def tokens(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 96, n).tolist()
    return ids


class Faulty(Session):
    """A backend that goes wrong: after forward number `at`, `fault` changes the state's payload."""

    at = 0
    seen = 0
    armed = True

    def fault(self, payload: np.ndarray) -> None:
        raise NotImplementedError

    def step(self, token_id: int) -> np.ndarray:
        super().step(token_id)
        # not a count of forwards: a second reading of the same tokens fails again
        if self.position == self.at:
            self.set_state(self.changed(self.state()))
        return self.logits()

    def changed(self, state: bytes) -> bytes:
        data = bytearray(state)
        self.fault(np.frombuffer(data, np.float32, offset=len(data) - self.model.state_bytes))
        return at_position(bytes(data), self.position)  # sealed again

    def column(self, payload: np.ndarray, layer: int, value: bool) -> np.ndarray:
        """The newest column (K, d) of a layer, to be changed."""
        m = self.model.manifest
        offset = (8 + 8 + 4 * m.model.vocab_size) // 4
        shape = (2 * m.model.num_layers, m.model.num_kv_heads, m.cache.capacity, m.model.head_dim)
        slots = payload[offset : offset + math.prod(shape)].reshape(shape)
        return slots[2 * layer + value, :, self.live_slots - 1]


# --- what others chose -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lococo", "h2o"])
@pytest.mark.parametrize("local_len", [0, 3])
def test_a_selection_is_read_off_its_outcome(policy: str, local_len: int) -> None:
    """Fused by scores with an error, judged by those without: the selection is found, and so is the error."""
    if policy == "lococo":
        cache = small_cache(local_len=local_len)
    else:
        cache = LococoConfig(12, 12, 8, policy="h2o", local_len=local_len, buffer=4)
    generator = torch.Generator().manual_seed(0)
    heads, columns, length = 2, 24, torch.tensor([20])
    key, value = torch.randn(2, 1, heads, columns, 8, generator=generator)
    key[:, :, 20:], value[:, :, 20:] = 0, 0
    scores = torch.rand(1, heads, columns, generator=generator)
    geometry = type("G", (), {"num_layers": 1, "head_dim": 8})
    head = random_heads(geometry, cache)[0] if policy == "lococo" else None  # type: ignore[arg-type]
    for error in (0.0, 0.05, 0.3):
        noisy = scores * (1 + error * torch.randn(scores.shape, generator=generator))
        fused = fuse_slots(key, value, noisy, length, cache, head)
        nearly = [x + 1e-4 * torch.randn(x.shape, generator=generator) for x in (fused.key, fused.value)]
        taken = taken_selection((nearly[0], nearly[1]), key, value, scores, length, cache, head)
        assert taken is not None
        assert torch.equal(taken.selection.keep, fused.selection.keep)
        assert torch.equal(taken.selection.residual, fused.selection.residual)
        own = select(scores, length, cache)
        same = torch.equal(own.keep, fused.selection.keep) and torch.equal(own.residual, fused.selection.residual)
        assert (taken.swapped == 0) == same == (taken.margin == 0)
        again = fuse_slots(key, value, scores, length, cache, head, taken.selection)
        torch.testing.assert_close(again.key, fused.key)
    assert taken.swapped > 0
    assert 0 < taken.margin < 1


def test_slots_in_another_order_are_no_selection() -> None:
    cache = LococoConfig(12, 12, 8, policy="h2o", local_len=3, buffer=4)
    key, value = torch.randn(2, 1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    scores, length = torch.rand(1, 2, 24), torch.tensor([20])
    fused: FusedSlots = fuse_slots(key, value, scores, length, cache, None)
    shuffled = fused.key.flip(2), fused.value.flip(2)
    assert taken_selection(shuffled, key, value, scores, length, cache, None) is None
    without_recent = select(scores, length, cache, keep=torch.arange(12).expand(1, 2, 12))
    other = fuse_slots(key, value, scores, length, cache, None, without_recent)
    assert taken_selection((other.key, other.value), key, value, scores, length, cache, None) is None


@pytest.mark.parametrize("policy", ["lococo", "h2o"])
def test_half_precision_agrees_whatever_ties_decide(policy: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """ONNX Runtime rounds float16 elsewhere than PyTorch, so that fusions take other columns now and then."""
    if policy == "h2o":
        make_model(tmp_path / "plain", num_hidden_layers=3)
        checkpoint = load_checkpoint(tmp_path / "plain", policy="h2o", mem_size=24, block_size=16)
    export_bundle(checkpoint, tmp_path / "half", dtype="float16")
    with Session(tmp_path / "half") as session:
        report = verify_bundle(session, ReferenceModel(checkpoint, torch.float16), tokens(250), 150)
    assert report.agrees, str(report)
    assert report.fusions > 8
    assert report.slots > 1000


# --- what is found ---------------------------------------------------------------------------------------------------


def test_one_wrong_column_is_named_by_forward_and_layer(bundle: Path, checkpoint: Checkpoint) -> None:
    class WrongValue(Faulty):
        at = 61

        def fault(self, payload: np.ndarray) -> None:
            self.column(payload, layer=1, value=True)[:] *= -1

    with WrongValue(bundle) as session:
        report = verify_bundle(
            session, ReferenceModel(checkpoint), tokens(48 + STEPS), STEPS, third=lambda: Session(bundle)
        )
    found = report.divergence
    assert found is not None
    assert found.position == 61
    assert found.tensor == "past_key_values.1.value"
    assert found.forward.startswith(f"forward {48 // 8 + 61 - 48} (step")
    assert "layer 0's attention or MLP" in str(found)
    assert "another backend, from the same state, agrees with PyTorch" in str(found)


def test_a_wrong_fusion_is_told_from_a_wrong_layer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first, second, third = checkpoint.heads
    other = dataclasses.replace(second, normalizer=second.normalizer + 0.3)
    export_bundle(dataclasses.replace(checkpoint, heads=(first, other, third)), tmp_path / "bundle")
    with Session(tmp_path / "bundle") as session:
        report = verify_bundle(session, ReferenceModel(checkpoint), tokens(48 + STEPS), STEPS)
    found = report.divergence
    assert found is not None
    assert found.tensor == "past_key_values.1.key"
    assert "with a fusion" in found.forward
    assert found.findings[0].endswith("agree: look at layer 1's fusion")


def test_a_missing_third_backend_hides_nothing(bundle: Path, checkpoint: Checkpoint) -> None:
    class WrongKey(Faulty):
        at = 50

        def fault(self, payload: np.ndarray) -> None:
            self.column(payload, layer=0, value=False)[:] += 1

    def missing() -> Session:
        raise NotFoundError("no ONNX Runtime here")

    with WrongKey(bundle) as session:
        report = verify_bundle(session, ReferenceModel(checkpoint), tokens(48 + STEPS), STEPS, third=missing)
    assert "past_key_values.0.key" in str(report.divergence)
    assert "the embedding" in str(report.divergence)
    assert "could not be asked: no ONNX Runtime here" in str(report.divergence)


def test_a_number_that_is_not_finite_is_named(bundle: Path, checkpoint: Checkpoint) -> None:
    class Overflow(Faulty):
        at = 60

        def fault(self, payload: np.ndarray) -> None:
            self.column(payload, layer=2, value=False)[0, 3] = np.inf

    with Overflow(bundle) as session:
        report = verify_bundle(session, ReferenceModel(checkpoint), tokens(48 + STEPS), STEPS)
    assert report.divergence is not None
    assert report.divergence.tensor == "past_key_values.2.key"
    assert "1 of 16 numbers are not finite" in report.divergence.detail
    assert "PyTorch stays finite, its largest value is" in str(report.divergence)


def test_an_overflow_of_the_model_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Layer 1's feed-forward is beyond float16; everything before it is not."""
    copy = tmp_path / "hot"
    hot = make_lococo(copy)
    weights = {name: hot.tensors[f"model.layers.1.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")}
    edit_tensors(copy, {f"model.layers.1.mlp.{name}.weight": 300 * w for name, w in weights.items()})
    hot = load_checkpoint(copy)
    export_bundle(hot, tmp_path / "half", dtype="float16")
    with Session(tmp_path / "half") as session:
        report = verify_bundle(session, ReferenceModel(hot, torch.float16), tokens(40), 20)
    assert report.divergence is not None
    assert "PyTorch overflows too, first behind model.layers.1.mlp.down_proj" in str(report.divergence)


def test_small_differences_that_add_up_are_told_apart(bundle: Path, checkpoint: Checkpoint) -> None:
    """No forward is wrong by itself if both sides start from the same state."""

    class Drifting(Faulty):
        def fault(self, payload: np.ndarray) -> None:
            for layer in range(3):
                self.column(payload, layer, True)[:] *= 1.003

        def step(self, token_id: int) -> np.ndarray:
            self.at = self.position + 1
            return super().step(token_id)

    tight = Tolerance(1e-3, 0.99999, 0.999, 0.01, 1e-3)
    with Drifting(bundle) as session:
        report = verify_bundle(session, ReferenceModel(checkpoint), tokens(48 + STEPS), STEPS, tolerance=tight)
    assert report.divergence is not None
    assert "small differences add up" in str(report.divergence)


def test_selections_beyond_rounding_are_an_error(bundle: Path, checkpoint: Checkpoint) -> None:
    class Upside(ReferenceModel):
        """A reference that scores columns the other way round: the bundle's choices are all wrong to it."""

        def forward(self, *args: Any, **options: Any) -> Any:
            result = super().forward(*args, **options)
            result.scores[1] = 1 / (1e-3 + result.scores[1])
            return result

    with Session(bundle) as session:
        report = verify_bundle(session, Upside(checkpoint), tokens(48 + STEPS), STEPS)
    assert report.divergence is not None
    assert report.divergence.tensor == "selection of layer 1"


@pytest.mark.parametrize("count", [1, 5])
def test_polygraphy_runs_the_forward_that_is_dumped(bundle: Path, tmp_path: Path, count: int) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is missing: pip install 'lococo-export[tensorrt]'")
    with Session(bundle) as session:
        session.prefill(tokens(19))
        state, ids = session.state(), tokens(count, seed=1)
        expected = session.prefill(ids, return_all=False)
        manifest = session.model.manifest
    divergence = Divergence(19 + count, "forward", "logits", "", (), state, tuple(ids))
    command = dump_forward(bundle, manifest, divergence, tmp_path / "for polygraphy").replace(" --trt ", " ")
    arguments = shlex.split(command.split(" --trt-outputs")[0])[1:]
    outputs = tmp_path / "outputs.json"
    polygraphy = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
    subprocess.run([*polygraphy, *arguments, "--save-outputs", str(outputs)], check=True, capture_output=True)
    [found] = import_module("polygraphy.comparator").RunResults.load(str(outputs))[0][1]
    np.testing.assert_allclose(found["logits"][0], expected, rtol=0, atol=1e-5)  # marked tensors forbid merging nodes
    assert len(found) > 100  # not the outputs alone


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_tokens(bundle: Path, checkpoint: Checkpoint) -> None:
    ids = tokens(100)
    reference = ReferenceModel(checkpoint)
    logits = ReferenceSession(reference).prefill(ids, return_all=True)[0, :-1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp())
    with Session(bundle) as session:
        assert perplexities(session, reference, ids) == pytest.approx((expected, expected), rel=1e-4)
        session.reset()
        report = verify_bundle(session, reference, ids, 30)
        assert report.predicted == 99
        assert report.perplexity_ratio < 1e-5
        with pytest.raises(InvalidArgumentError, match="at least 2"):
            perplexities(session, reference, [3])


def test_another_perplexity_is_no_agreement() -> None:
    report = Report(Tolerance.for_dtype("float16"), nll=1.01 * 300, nll_reference=300, predicted=100)
    assert not report.agrees
    assert report.perplexity_ratio == pytest.approx(math.exp(0.03) - 1)
    assert Report(Tolerance.for_dtype("float16"), nll=300, nll_reference=300, predicted=100).agrees
    assert not Report(Tolerance.for_dtype("float16"), nll=math.nan, nll_reference=300, predicted=100).agrees


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(bundle: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(bundle), "--model", str(checkpoint.source_dir), "--prefill", "50", "--steps", "30"]
    assert verify_main([*command, "--perplexity", "60"]) == 0
    out = capsys.readouterr().out
    assert "perplexity of 60 tokens" in out
    versions = rf"^ONNX Runtime [\d.]+ on cpu; PyTorch {re.escape(torch.__version__)}; lococo-verify"
    assert re.search(versions, out, re.MULTILINE)
    assert "agrees" in out
    assert verify_main([*command, "--device", "cuda:0", "--backend", "onnxruntime2"]) == 1
    assert "onnxruntime2" in capsys.readouterr().err


def test_command_dumps_what_diverges(
    bundle: Path, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is missing: pip install 'lococo-export[tensorrt]'")
    shutil.copytree(checkpoint.source_dir, tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(tmp_path / "other", {name: -load_file(tmp_path / "other" / "model.safetensors")[name]})
    command = [str(bundle), "--model", str(tmp_path / "other"), "--prefill", "20", "--steps", "20"]
    assert verify_main([*command, "--dump", str(tmp_path / "dump")]) == 1
    assert f"polygraphy run {tmp_path / 'dump' / 'model.onnx'}" in capsys.readouterr().out
    assert (tmp_path / "dump" / "inputs.json").exists()
    assert verify_main([*command, "--dump", str(tmp_path / "dump")]) == 1
    assert "already exists; choose another directory" in capsys.readouterr().err
