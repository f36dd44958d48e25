"""A bundle against the PyTorch reference: logits after every forward, the state at every fusion."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lococo_runtime import ConfigError, InvalidArgumentError, Session
from lococo_runtime.bundle import Manifest, TensorSpec
from torch import Tensor

from .checkpoints import Checkpoint, load_checkpoint
from .onnx_writer import TORCH_DTYPES
from .reference import LococoState, ReferenceModel, ReferenceSession


@dataclass(frozen=True)
class Tolerance:
    """What counts as agreement. Cosines and norm ratios are taken over whole tensors, live columns only."""

    logits_max_abs: float
    logits_cosine: float
    state_cosine: float
    state_norm_ratio: float

    @classmethod
    def for_dtype(cls, dtype: str) -> Tolerance:
        """float32: rounding only. Half precisions: what different orders of summation leave."""
        if dtype == "float32":
            return cls(1e-3, 0.99999, 0.999, 0.01)
        return cls(float("inf"), 0.999, 0.995, 0.01)


@dataclass(frozen=True)
class Divergence:
    """The first forward that is out of tolerance, and the first tensor that is."""

    position: int
    forward: str
    tensor: str
    detail: str

    def __str__(self) -> str:
        return f"first divergence: {self.forward} ending at position {self.position:,}, {self.tensor}: {self.detail}"


@dataclass
class Report:
    """What `verify_bundle` saw; worst values over the whole run."""

    tolerance: Tolerance
    forwards: int = 0
    fusions: int = 0
    logits_max_abs: float = 0.0
    logits_cosine: float = 1.0
    state_cosine: float = 1.0
    state_norm_ratio: float = 0.0
    greedy_matches: int = 0
    tokens: int = 0
    divergence: Divergence | None = None

    def __str__(self) -> str:
        rows = [
            ("forwards", f"{self.forwards:,}, {self.tokens:,} tokens"),
            ("greedy tokens equal", f"{self.greedy_matches:,} of {self.tokens:,}"),
            ("logits, max abs difference", f"{self.logits_max_abs:.2e} (at most {self.tolerance.logits_max_abs:g})"),
            ("logits, least cosine", f"{self.logits_cosine:.7f} (at least {self.tolerance.logits_cosine:g})"),
            ("fusions", f"{self.fusions:,}"),
            ("state, least cosine", f"{self.state_cosine:.7f} (at least {self.tolerance.state_cosine:g})"),
            ("state, norm ratio off by", f"{self.state_norm_ratio:.2e} (at most {self.tolerance.state_norm_ratio:g})"),
        ]
        lines = [f"{name:<28} {value}" for name, value in rows]
        return "\n".join([*lines, str(self.divergence) if self.divergence else "agrees"])


def checkpoint_of(manifest: Manifest, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint a bundle was made from, read with the bundle's own settings.

    Raises:
        ConfigError: the checkpoint has another geometry or another slot cache.
    """
    cache = manifest.cache
    lococo = cache.policy == "lococo"
    checkpoint = load_checkpoint(
        path,
        policy=cache.policy,
        mem_size=cache.mem_size,
        # any rate with int(M * (1 - r)) = mc, away from the edge where the product rounds
        hh_keep_rate=max(0.0, (cache.keep - 0.5) / cache.mem_size) if lococo else None,
        local_len=cache.local_len if lococo else None,
        block_size=cache.block_size,
        activation=cache.activation if lococo else None,
        buffer=cache.buffer,
        allow_pickle=allow_pickle,
    )
    for what, expected, got in (
        ("geometry", manifest.model, checkpoint.geometry),
        ("slot cache", cache, checkpoint.config),
    ):
        if expected != got:
            want, have = dataclasses.asdict(expected), dataclasses.asdict(got)
            differing = "; ".join(f"{k}: expected {want[k]!r}, got {have[k]!r}" for k in want if want[k] != have[k])
            raise ConfigError(f"{path}: {what} differs from the bundle's: {differing}; pass the bundle's source")
    return checkpoint


def verify_bundle(
    session: Session,
    reference: ReferenceModel,
    ids: Sequence[int],
    steps: int,
    *,
    tolerance: Tolerance | None = None,
    free_running: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Reads `ids` on both sides, the last `steps` of them one by one, the others in blocks, and compares.

    At every fusion the states are compared, and the reference takes over the bundle's, so that each window is judged
    from the same state: two scores a rounding apart may select different slots, which is no error but changes all that
    follows. `free_running` leaves both to themselves. Stops at the first divergence.

    Args:
        session: empty, on the bundle.
        reference: of the bundle's checkpoint, in the bundle's dtype.
        ids: token ids, at least one more than `steps`.
        steps: how many of them to read in forwards of one.
        progress: called with tokens read and tokens in all.

    Raises:
        InvalidArgumentError: fewer ids than steps.
    """
    manifest = session.model.manifest
    if len(ids) <= steps:
        raise InvalidArgumentError(f"ids: expected more than steps={steps}, got {len(ids)}")
    report = Report(tolerance or Tolerance.for_dtype(manifest.dtype))
    other = ReferenceSession(reference)
    block = manifest.cache.block_size
    prompt = len(ids) - steps
    pieces = [list(ids[i : min(i + block, prompt)]) for i in range(0, prompt, block)] + [[i] for i in ids[prompt:]]
    fusions = 0
    for piece in pieces:
        if len(piece) > 1:
            ours = torch.from_numpy(session.prefill(piece, return_all=True))
        else:
            ours = torch.from_numpy(session.step(piece[0]))[None]
        theirs = other.read(torch.tensor([piece], device=reference.device)).logits[0].cpu()
        report.forwards += 1
        report.tokens += len(piece)
        report.greedy_matches += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        detail = _compare_logits(ours, theirs, report)
        fused = session.counters["fusions"] > fusions
        fusions = report.fusions = session.counters["fusions"]
        if fused or detail:
            state = read_state(manifest, session.state())
            wrong = _compare_state(manifest, state, other.state, report)
            if wrong or detail:
                tensor, why = wrong or ("logits", detail)
                kind = f"forward {report.forwards} ({'step' if len(piece) == 1 else f'block of {len(piece)}'}"
                kind += ", with a fusion)" if fused else ")"
                report.divergence = Divergence(session.position, kind, tensor, why)
                return report
            if not free_running:
                other.state = to_device(state, reference.device)
        progress(report.tokens, len(ids))
    return report


def read_state(manifest: Manifest, data: bytes) -> LococoState:
    """The tensors of a saved state; its header has been checked by the runtime that wrote it."""
    payload = memoryview(bytearray(data))[len(data) - manifest.state_bytes :]
    tensors: dict[str, Tensor] = {}
    offset = 0
    for spec in manifest.state:
        tensors[spec.name] = _view(payload[offset : offset + spec.nbytes], spec)
        offset += spec.nbytes
    layers = range(manifest.model.num_layers)
    return LococoState(
        keys=[tensors[f"past_key_values.{i}.key"] for i in layers],
        values=[tensors[f"past_key_values.{i}.value"] for i in layers],
        scores=[tensors[f"past_scores.{i}"] for i in layers] if manifest.cache.score_decay > 0 else [],
        length=tensors["past_length"],
        position=tensors["position"],
        logits=tensors["logits"],
    )


def to_device(state: LococoState, device: torch.device) -> LococoState:
    """A copy of `state` on `device`."""

    def move(tensors: list[Tensor]) -> list[Tensor]:
        return [t.to(device) for t in tensors]

    return LococoState(
        move(state.keys),
        move(state.values),
        move(state.scores),
        state.length.to(device),
        state.position.to(device),
        state.logits.to(device),
    )


def _view(data: memoryview, spec: TensorSpec) -> Tensor:
    dtypes = {**TORCH_DTYPES, "int32": torch.int32, "int64": torch.int64}
    return torch.frombuffer(data, dtype=dtypes[spec.dtype]).reshape(spec.shape)


def _compare_logits(ours: Tensor, theirs: Tensor, report: Report) -> str:
    """Updates the worst values; says what is out of tolerance, "" if nothing. Both (T, V) float32."""
    if not bool(torch.isfinite(ours).all()):
        return "not finite"
    worst = float((ours - theirs).abs().max())
    cosine = float(torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())
    report.logits_max_abs = max(report.logits_max_abs, worst)
    report.logits_cosine = min(report.logits_cosine, cosine)
    t = report.tolerance
    if worst > t.logits_max_abs:
        return f"max abs difference {worst:.3g}, at most {t.logits_max_abs:g}"
    if cosine < t.logits_cosine:
        return f"cosine {cosine:.7f}, at least {t.logits_cosine:g}"
    return ""


def _compare_state(
    manifest: Manifest, ours: LococoState, theirs: LococoState, report: Report
) -> tuple[str, str] | None:
    """Updates the worst values; the first tensor out of tolerance, in the order of computation, and why."""
    length, expected = int(ours.length[0]), int(theirs.length[0])
    if length != expected:
        return "past_length", f"{length} live slots, the reference has {expected}"
    t, found = report.tolerance, None
    for i in range(manifest.model.num_layers):
        prefix = f"past_key_values.{i}"
        pairs = [(f"{prefix}.key", ours.keys, theirs.keys), (f"{prefix}.value", ours.values, theirs.values)]
        if ours.scores:
            pairs.append((f"past_scores.{i}", ours.scores, theirs.scores))
        for name, a, b in pairs:
            x, y = a[i][:, :, :length].double().flatten(), b[i][:, :, :length].cpu().double().flatten()
            cosine = float(torch.cosine_similarity(x, y, dim=0)) if bool(torch.isfinite(x).all()) else float("nan")
            ratio = abs(float(x.norm() / y.norm()) - 1)
            report.state_cosine = min(report.state_cosine, cosine)
            report.state_norm_ratio = max(report.state_norm_ratio, ratio)
            if found is None and not (cosine >= t.state_cosine and ratio <= t.state_norm_ratio):
                found = (
                    name,
                    f"cosine {cosine:.7f} (at least {t.state_cosine:g}), norm off by {ratio:.2e}",
                )
    return found
