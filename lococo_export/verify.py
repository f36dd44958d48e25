"""A bundle against the PyTorch reference: logits after every forward, the state at every fusion."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

import onnx
import onnx.inliner
import torch
import torch.nn.functional as F
from lococo_runtime import ConfigError, InvalidArgumentError, LococoError, Session, TargetExistsError, UnsupportedError
from lococo_runtime.bundle import WEIGHTS_NAME, GraphSpec, Manifest, publish_directory
from torch import Tensor

from .checkpoints import Checkpoint, load_checkpoint
from .cuda_graphs import capture
from .onnx_writer import TORCH_DTYPES
from .reference import ForwardResult, FusedSlots, LococoState, ReferenceModel, fuse_slots, join_columns
from .selection import taken_selection

_P = ParamSpec("_P")
_T = TypeVar("_T")
_DTYPES = {**TORCH_DTYPES, "int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class Tolerance:
    """What counts as agreement. Cosines and norm ratios are taken over whole tensors, live columns only.

    `score_margin` is how far, relatively, a column that a fusion took may lie below the best one it left out.
    """

    logits_max_abs: float
    logits_cosine: float
    state_cosine: float
    state_norm_ratio: float
    score_margin: float
    perplexity: float = 0.005

    @classmethod
    def for_dtype(cls, dtype: str) -> Tolerance:
        """float32: rounding only. Half precisions: what different orders of summation leave."""
        if dtype == "float32":
            return cls(1e-3, 0.99999, 0.999, 0.01, 1e-3)
        return cls(float("inf"), 0.999, 0.995, 0.01, 0.1)


@dataclass(frozen=True)
class Divergence:
    """The first forward that is out of tolerance, the first tensor that is, and what is known of the cause.

    `state` is the saved state in front of that forward, `tokens` what it read.
    """

    position: int
    forward: str
    tensor: str
    detail: str
    findings: tuple[str, ...]
    state: bytes = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)

    def __str__(self) -> str:
        first = f"first divergence: {self.forward} ending at position {self.position:,}, {self.tensor}: {self.detail}"
        return "\n".join([first, *(f"  {line}" for line in self.findings)])


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
    slots: int = 0
    swapped: int = 0
    score_margin: float = 0.0
    greedy_matches: int = 0
    tokens: int = 0
    nll: float = 0.0
    """Sum of the negative log likelihoods of the bundle, `nll_reference` of PyTorch, over `predicted` tokens."""
    nll_reference: float = 0.0
    predicted: int = 0
    divergence: Divergence | None = None

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of the bundle and of PyTorch."""
        count = max(self.predicted, 1)
        return _exp(self.nll / count), _exp(self.nll_reference / count)

    @property
    def perplexity_ratio(self) -> float:
        """How far the bundle's perplexity is off."""
        return abs(_exp((self.nll - self.nll_reference) / max(self.predicted, 1)) - 1)

    @property
    def agrees(self) -> bool:
        """Nothing is out of tolerance."""
        return self.divergence is None and not self.perplexity_ratio > self.tolerance.perplexity

    def __str__(self) -> str:
        t = self.tolerance
        ours, theirs = self.perplexity
        rows = [
            ("forwards", f"{self.forwards:,}, {self.tokens:,} tokens"),
            ("greedy tokens equal", f"{self.greedy_matches:,} of {self.tokens:,}"),
            ("logits, max abs difference", f"{self.logits_max_abs:.2e} (at most {t.logits_max_abs:g})"),
            ("logits, least cosine", f"{self.logits_cosine:.7f} (at least {t.logits_cosine:g})"),
            (
                "perplexity",
                f"{ours:.4f}, PyTorch {theirs:.4f}: off by {self.perplexity_ratio:.2e} (at most {t.perplexity:g})",
            ),
            ("fusions", f"{self.fusions:,}"),
            ("state, least cosine", f"{self.state_cosine:.7f} (at least {t.state_cosine:g})"),
            ("state, norm ratio off by", f"{self.state_norm_ratio:.2e} (at most {t.state_norm_ratio:g})"),
            (
                "slots ranked otherwise",
                f"{self.swapped:,} of {self.slots:,}, score {self.score_margin:.1e} apart (at most {t.score_margin:g})",
            ),
        ]
        lines = [f"{name:<28} {value}" for name, value in rows]
        if self.divergence:
            lines.append(str(self.divergence))
        return "\n".join([*lines, *(["agrees"] if self.agrees else [])])


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


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


def _exactly(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Without gradients, and without TF32, which PyTorch allows itself in float32 convolutions on a GPU."""

    @functools.wraps(function)
    def inner(*args: _P.args, **options: _P.kwargs) -> _T:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return function(*args, **options)

    return inner


@_exactly
def verify_bundle(
    session: Session,
    reference: ReferenceModel,
    ids: Sequence[int],
    steps: int,
    *,
    tolerance: Tolerance | None = None,
    free_running: bool = False,
    third: Callable[[], Session] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Reads `ids` on both sides, the last `steps` of them one by one, the others in blocks, and compares.

    Logits are compared after every forward. At every fusion the slots are compared, for the columns that the bundle's
    fusion took, and the reference takes over the bundle's state, byte for byte, so that each stretch is judged from the
    same state. `free_running` leaves both to themselves. Stops at the first divergence, goes back to the last common
    state, and hands over the state after every forward, to name the first forward and the first layer that are wrong.

    Args:
        session: empty, on the bundle.
        reference: of the bundle's checkpoint, in the bundle's dtype; best on the same device.
        ids: token ids, at least one more than `steps`.
        steps: how many of them to read in forwards of one.
        third: opens a session of the same bundle on another backend, asked for its opinion on the first bad forward.
        progress: called with tokens read and tokens in all.

    Raises:
        InvalidArgumentError: fewer ids than steps.
    """
    manifest = session.model.manifest
    if len(ids) <= steps:
        raise InvalidArgumentError(f"ids: expected more than steps={steps}, got {len(ids)}")
    report = Report(tolerance or Tolerance.for_dtype(manifest.dtype))
    comparison = _Comparison(session, _Follower(reference), report, free_running)
    common, since = session.state(), list[list[int]]()
    block = manifest.cache.block_size
    prompt = len(ids) - steps
    pieces = [list(ids[i : min(i + block, prompt)]) for i in range(0, prompt, block)] + [[i] for i in ids[prompt:]]
    for piece in pieces:
        following = ids[report.tokens + 1 : report.tokens + 1 + len(piece)]
        since.append(piece)
        outcome = comparison.forward(piece, following)
        if outcome.wrong:
            found = _first_bad_forward(comparison, common, since, outcome.wrong)
            report.divergence = found if third is None else _ask(third, comparison, found)
            return report
        if outcome.state is not None and not free_running:
            common, since = outcome.state, []
        progress(report.tokens, len(ids))
    return report


@_exactly
def perplexities(
    session: Session,
    reference: ReferenceModel,
    ids: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """Perplexity of `ids`, read in blocks by the bundle and by PyTorch, each from its own state.

    Args:
        session: is reset.
        reference: of the bundle's checkpoint.
        ids: at least two tokens.
        progress: called with tokens read and tokens in all.

    Raises:
        InvalidArgumentError: fewer than two ids.
    """
    if len(ids) < 2:
        raise InvalidArgumentError(f"ids: expected at least 2 tokens, got {len(ids)}")
    session.reset()
    follower = _Follower(reference)
    block, nll = session.model.manifest.cache.block_size, [0.0, 0.0]
    for first in range(0, len(ids), block):
        piece, following = list(ids[first : first + block]), ids[first + 1 : first + 1 + block]
        ours = torch.from_numpy(session.prefill(piece, return_all=True)).to(reference.device)
        result = follower.read(piece)
        follower.update(result)
        nll = [x + _nll(logits, following) for x, logits in zip(nll, (ours, result.logits[0]), strict=True)]
        progress(first + len(piece), len(ids))
    return _exp(nll[0] / (len(ids) - 1)), _exp(nll[1] / (len(ids) - 1))


# --- one forward ------------------------------------------------------------------------------------------------------


class _Follower:
    """The reference beside a runtime: it knows its length on the host, and on a GPU its steps are CUDA graphs.

    Eager steps of a small model take 60 ms on any GPU, which is all launches.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.state = model.empty_state()
        self.length = 0
        self.graph: _StepGraph | None = None

    def take_over(self, state: LococoState) -> None:
        """Goes on from `state`."""
        self._keep(to_device(state, self.model.device))
        self.length = int(state.length[0])

    def read(self, ids: Sequence[int]) -> ForwardResult:
        """A forward; the state is not touched. The result of a step is valid until the next one."""
        tensor = torch.tensor([list(ids)], device=self.model.device)
        if len(ids) > 1 or self.model.device.type != "cuda":
            result: ForwardResult = self.model(tensor, self.state)
            return result
        if self.graph is None:
            self.graph = _StepGraph(self.model, self.state)
            self.state = self.graph.state
        return self.graph.read(tensor)

    def fuses(self, n: int) -> bool:
        """Whether a forward of n tokens ends with a fusion."""
        return self.length + n > self.model.cache.capacity

    def update(self, result: ForwardResult) -> None:
        """Appends or fuses."""
        n = result.new_keys[0].shape[2]
        fuses = self.fuses(n)
        if n == 1 and not fuses and self.graph is not None:
            self.graph.append.replay()
        else:
            self._keep(self.model.update(self.state, result, fuse=fuses))
        self.length = self.model.cache.mem_size if fuses else self.length + n

    def _keep(self, state: LococoState) -> None:
        if self.graph is None:
            self.state = state
        else:
            copy_state(self.graph.state, state)


class _StepGraph:
    """A forward of one token over buffers of its own as a CUDA graph, and its append as another."""

    def __init__(self, model: ReferenceModel, state: LococoState) -> None:
        self._model = model
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.state = to_device(state, model.device, copy=True)
        self.result: ForwardResult
        self.forward = capture(self._read, model.device)
        self.append = capture(lambda: copy_state(self.state, self._appended()), model.device, warm_up=self._appended)

    def _read(self) -> None:
        self.result = self._model(self.ids, self.state)

    def _appended(self) -> LococoState:
        return self._model.update(self.state, self.result, fuse=False)

    def read(self, ids: Tensor) -> ForwardResult:
        self.ids.copy_(ids)
        self.forward.replay()
        return self.result


@dataclass(frozen=True)
class _Outcome:
    """Of one forward: the state if it was looked at, the first tensor that is wrong, with the reason, and whether only
    its fusion can have made that so, as its logits agree."""

    state: bytes | None
    wrong: tuple[str, str] | None
    by_fusion: bool = False


class _Comparison:
    """Both sides, forward by forward; the worst values go to `report`."""

    def __init__(self, session: Session, reference: _Follower, report: Report, free_running: bool = False) -> None:
        self.session, self.reference, self.report, self.free_running = session, reference, report, free_running
        self.manifest = session.model.manifest

    def forward(self, piece: Sequence[int], following: Sequence[int] = (), columns: bool = False) -> _Outcome:
        """Reads `piece` on both sides and compares; with `columns` the new columns of all layers too.

        Where the bundle's state was looked at, the reference takes it over, unless it runs free.
        `following` are the tokens after each of `piece`, as far as there are any.
        """
        r, before = self.report, self.reference.state
        length, fuses = self.reference.length, self.reference.fuses(len(piece))
        logits = self.session.prefill(piece, return_all=True) if len(piece) > 1 else self.session.step(piece[0])[None]
        ours = torch.from_numpy(logits).to(self.reference.model.device)
        result = self.reference.read(piece)
        theirs = result.logits[0]
        r.forwards += 1
        r.tokens += len(piece)
        r.greedy_matches += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        if len(following):
            r.nll += _nll(ours, following)
            r.nll_reference += _nll(theirs, following)
            r.predicted += len(following)
        detail = _compare_logits(ours, theirs, r)
        wrong = ("logits", detail) if detail else None
        state = None
        if fuses or columns:
            state = self.session.state()
            after = to_device(read_state(self.manifest, state), self.reference.model.device)
            r.fusions += fuses
            expected_length = self.manifest.cache.mem_size if fuses else length + len(piece)
            if int(after.length[0]) != expected_length:
                found = f"{int(after.length[0])} live slots, the reference has {expected_length}"
                return _Outcome(state, ("past_length", found))
            # layers first: logits are computed from them
            compare = self._compare_fusion if fuses else self._compare_columns
            wrong = compare(before, result, after, length) or wrong
        if state is not None and not self.free_running:
            self.reference.take_over(after)
        else:
            self.reference.update(result)
        return _Outcome(state, wrong, by_fusion=fuses and not detail)

    def _compare_columns(
        self, before: LococoState, result: ForwardResult, after: LococoState, length: int
    ) -> tuple[str, str] | None:
        """The columns that a forward appended, layer by layer: the first tensor out of tolerance, and why."""
        end, found = int(after.length[0]), None
        for i in range(self.manifest.model.num_layers):
            for name, ours, theirs in (
                (f"past_key_values.{i}.key", after.keys, result.new_keys),
                (f"past_key_values.{i}.value", after.values, result.new_values),
            ):
                found = found or self._compare(name, ours[i][:, :, length:end], theirs[i])
        return found

    def _compare_fusion(
        self, before: LococoState, result: ForwardResult, after: LococoState, length: int
    ) -> tuple[str, str] | None:
        """The slots that a fusion left, layer by layer: the first tensor out of tolerance, and why."""
        model, cache, found = self.reference.model, self.manifest.cache, None
        n, slots = result.new_keys[0].shape[2], cache.capacity
        start = torch.tensor([length], device=model.device)
        count = torch.tensor([n], device=model.device)
        for i in range(self.manifest.model.num_layers):
            received = result.scores[i]
            key, value, scores = (
                join_columns(past, new, start, count)
                for past, new in (
                    (before.keys[i], result.new_keys[i]),
                    (before.values[i], result.new_values[i]),
                    (received[:, :, :slots], received[:, :, slots:]),
                )
            )
            columns = (key, value, scores, start + count, cache, model.heads[i] if model.heads else None)
            ours = after.keys[i][:, :, : cache.mem_size], after.values[i][:, :, : cache.mem_size]
            self.report.slots += ours[0].shape[1] * cache.mem_size
            expected, margin = fuse_slots(*columns), 0.0
            taken = taken_selection(ours, *columns) if all(bool(torch.isfinite(t).all()) for t in ours) else None
            if taken is not None and taken.swapped:
                other = fuse_slots(*columns, taken.selection)
                # columns that are much alike may be taken for each other
                if _distance(ours, other) < _distance(ours, expected):
                    expected, margin = other, taken.margin
                    self.report.swapped += taken.swapped
                    self.report.score_margin = max(self.report.score_margin, margin)
            found = found or self._compare(f"past_key_values.{i}.key", ours[0], expected.key)
            found = found or self._compare(f"past_key_values.{i}.value", ours[1], expected.value)
            if after.scores:
                mine = after.scores[i][:, :, : cache.mem_size]
                found = found or self._compare(f"past_scores.{i}", mine, expected.scores)
            if margin > self.report.tolerance.score_margin and not found:
                why = f"took a column whose score is {margin:.2e} below the best one left out"
                found = (f"selection of layer {i}", f"{why} (at most {self.report.tolerance.score_margin:g})")
        return found

    def _compare(self, name: str, ours: Tensor, theirs: Tensor) -> tuple[str, str] | None:
        """Updates the worst values; what is out of tolerance."""
        x, y, t = ours.double().flatten(), theirs.double().flatten(), self.report.tolerance
        for side, numbers in (("", x), (" in PyTorch", y)):
            if bad := int((~torch.isfinite(numbers)).sum()):
                return name, f"{bad:,} of {len(x):,} numbers are not finite{side}"
        cosine = float(torch.cosine_similarity(x, y, dim=0)) if bool(x.any()) or bool(y.any()) else 1.0
        ratio = abs(float(x.norm() / y.norm()) - 1) if bool(y.any()) else float(bool(x.any()))
        self.report.state_cosine = min(self.report.state_cosine, cosine)
        self.report.state_norm_ratio = max(self.report.state_norm_ratio, ratio)
        if cosine >= t.state_cosine and ratio <= t.state_norm_ratio:
            return None
        return name, f"cosine {cosine:.7f} (at least {t.state_cosine:g}), norm off by {ratio:.2e}"


# --- the first bad forward, and the first bad layer -------------------------------------------------------------------


def _first_bad_forward(
    comparison: _Comparison, common: bytes, pieces: list[list[int]], seen: tuple[str, str]
) -> Divergence:
    """Reads `pieces` once more from the state `common`, both sides from the same state before each of them."""
    session, reference, manifest = comparison.session, comparison.reference, comparison.manifest
    again = _Comparison(session, reference, Report(comparison.report.tolerance))
    first = comparison.report.forwards - len(pieces)
    session.set_state(common)
    for number, piece in enumerate(pieces, start=first + 1):
        before = session.state()
        reference.take_over(read_state(manifest, before))
        kind = _kind(number, piece, reference.fuses(len(piece)))
        outcome = again.forward(piece, columns=True)
        if outcome.wrong:
            tensor, detail = outcome.wrong
            findings = [_where(tensor, manifest.model.num_layers, outcome.by_fusion)]
            if "not finite" in detail:
                findings.append(_overflow(reference.model, read_state(manifest, before), piece))
            return Divergence(session.position, kind, tensor, detail, tuple(findings), before, tuple(piece))
    finding = "no forward is out of tolerance when both sides start from the same state: small differences add up"
    return Divergence(session.position, kind, *seen, (finding,), before, tuple(piece))


def _kind(number: int, piece: list[int], fuses: bool) -> str:
    kind = "step" if len(piece) == 1 else f"block of {len(piece)}"
    return f"forward {number} ({kind}{', with a fusion' if fuses else ''})"


def _where(tensor: str, num_layers: int, by_fusion: bool) -> str:
    """What to look at, given the first tensor that is wrong."""
    if tensor == "logits":
        return (
            f"keys and values of all layers agree: look at layer {num_layers - 1} behind them, the final norm, lm_head"
        )
    if tensor.startswith("past_length"):
        return "look at the cadence of fusions"
    if tensor.startswith(("selection", "past_scores")):
        return "keys and values agree: look at the scores of this layer's attention"
    layer = int(tensor.split(".")[1])
    if by_fusion:
        return f"the forward's logits and the layers before it agree: look at layer {layer}'s fusion"
    before = f"layer {layer - 1}'s attention or MLP" if layer else "the embedding"
    return f"the layers before it agree: look at {before}, and at layer {layer}'s norm, projections and fusion"


def _overflow(model: ReferenceModel, state: LococoState, piece: list[int]) -> str:
    """Where PyTorch overflows on the same tokens from the same state, or how near it comes."""
    limit, largest = torch.finfo(model.dtype).max, dict[str, float]()

    def watch(name: str) -> Callable[..., None]:
        def keep(_module: object, _inputs: object, out: object) -> None:
            if isinstance(out, Tensor):
                largest[name] = float(out.float().abs().max())  # NaN stays NaN

        return keep

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(torch.tensor([piece], device=model.device), to_device(state, model.device))
    finally:
        for handle in handles:
            handle.remove()
    holds = f"{model.dtype} holds up to {limit:g}"
    for name, value in largest.items():
        if not value <= limit:
            return f"PyTorch overflows too, first behind {name}: {holds}; export as bfloat16 or float32"
    name = max(largest, key=lambda k: largest[k])
    return (
        f"PyTorch stays finite, its largest value is {largest[name]:.4g} behind {name}, and {holds}:"
        " an intermediate result of the engine overflows; build it with more precision"
    )


def _ask(third: Callable[[], Session], comparison: _Comparison, divergence: Divergence) -> Divergence:
    """Adds what another backend says of the first bad forward."""
    try:
        with third() as session:
            session.set_state(divergence.state)
            comparison.reference.take_over(read_state(comparison.manifest, divergence.state))
            again = _Comparison(session, comparison.reference, Report(comparison.report.tolerance))
            outcome = again.forward(divergence.tokens, columns=True)
    except LococoError as e:
        finding = f"another backend could not be asked: {e}"
        return dataclasses.replace(divergence, findings=(*divergence.findings, finding))
    if outcome.wrong:
        opinion = f"differs from PyTorch too, in {outcome.wrong[0]}: the export or the checkpoint is to blame"
    else:
        opinion = "agrees with PyTorch on it: this backend, or its engine, is to blame"
    finding = f"another backend, from the same state, {opinion}"
    return dataclasses.replace(divergence, findings=(*divergence.findings, finding))


def require_dump(manifest: Manifest, target: Path) -> None:
    """What `dump_forward` will need.

    Raises:
        TargetExistsError: `target` exists.
        UnsupportedError: Polygraphy is missing, or the bundle is bfloat16, which numpy and so Polygraphy's files lack.
    """
    if target.exists():
        raise TargetExistsError(f"{target}: already exists; choose another directory")
    if manifest.dtype == "bfloat16":
        raise UnsupportedError(f"{target}: Polygraphy's files hold no bfloat16; export as float16 or float32")
    if find_spec("polygraphy") is None:
        raise UnsupportedError(f"{target}: its inputs are written by Polygraphy: pip install polygraphy")


def dump_forward(bundle: Path, manifest: Manifest, divergence: Divergence, target: Path) -> str:
    """Writes the graph of the forward that diverged, without functions, its weights and its inputs to a new directory.

    Args:
        bundle: of `manifest`.
        target: gets model.onnx, its weights, and inputs.json, which `polygraphy run --load-inputs` reads.

    Returns:
        The command by which Polygraphy compares every tensor of the graph between ONNX Runtime and TensorRT.

    Raises:
        TargetExistsError, UnsupportedError: as `require_dump`.
        StorageError, NoSpaceError: `target` cannot be written.
    """
    require_dump(manifest, target)
    polygraphy = import_module("polygraphy.json")
    graph, feed = _decoder_inputs(manifest, divergence)
    model = onnx.load(bundle / graph.file, load_external_data=False)
    with publish_directory(target) as staging:
        (staging / "model.onnx").write_bytes(onnx.inliner.inline_local_functions(model).SerializeToString())
        shutil.copyfile(bundle / WEIGHTS_NAME, staging / WEIGHTS_NAME)  # onnx refuses links
        polygraphy.save_json([{name: tensor.numpy() for name, tensor in feed.items()}], str(staging / "inputs.json"))
    where, inputs = (shlex.quote(str(target / name)) for name in ("model.onnx", "inputs.json"))
    sides = "--onnxrt --trt --onnx-outputs mark all --trt-outputs mark all"
    return f"polygraphy run {where} --load-inputs {inputs} {sides}"


def _decoder_inputs(manifest: Manifest, divergence: Divergence) -> tuple[GraphSpec, dict[str, Tensor]]:
    """The graph that reads the forward's tokens, and its inputs by name, on the CPU (docs/bundle.md, Graphs)."""
    n = len(divergence.tokens)
    decoders = [g for g in manifest.graphs if g.kind == "decoder" and g.batch == 1 and g.tokens >= n]
    graph = min(decoders, key=lambda g: g.tokens)
    padded = [*divergence.tokens, *[0] * (graph.tokens - n)]
    tensors = _state_tensors(manifest, divergence.state)
    tensors |= {
        "input_ids": torch.tensor([padded]),
        "position_ids": tensors["position"],
        "num_tokens": torch.tensor([n]),
    }
    return graph, {t.name: tensors[t.name].to(_DTYPES[t.dtype]).reshape(t.shape) for t in graph.inputs}


def read_state(manifest: Manifest, data: bytes) -> LococoState:
    """The tensors of a saved state; its header has been checked by the runtime that wrote it."""
    tensors = _state_tensors(manifest, data)
    layers = range(manifest.model.num_layers)
    return LococoState(
        keys=[tensors[f"past_key_values.{i}.key"] for i in layers],
        values=[tensors[f"past_key_values.{i}.value"] for i in layers],
        scores=[tensors[f"past_scores.{i}"] for i in layers] if manifest.cache.score_decay > 0 else [],
        length=tensors["past_length"],
        position=tensors["position"],
        logits=tensors["logits"],
    )


def _state_tensors(manifest: Manifest, data: bytes) -> dict[str, Tensor]:
    payload = memoryview(bytearray(data))[len(data) - manifest.state_bytes :]
    tensors: dict[str, Tensor] = {}
    offset = 0
    for spec in manifest.state:
        view = torch.frombuffer(payload[offset : offset + spec.nbytes], dtype=_DTYPES[spec.dtype])
        tensors[spec.name] = view.reshape(spec.shape)
        offset += spec.nbytes
    return tensors


def to_device(state: LococoState, device: torch.device, copy: bool = False) -> LococoState:
    """`state` on `device`; with `copy` in tensors of its own."""

    def move(tensors: list[Tensor]) -> list[Tensor]:
        return [t.to(device, copy=copy) for t in tensors]

    return LococoState(
        move(state.keys),
        move(state.values),
        move(state.scores),
        *move([state.length, state.position, state.logits]),
    )


def _distance(ours: tuple[Tensor, Tensor], theirs: FusedSlots) -> float:
    return float(sum((a.float() - b.float()).norm() for a, b in zip(ours, (theirs.key, theirs.value), strict=True)))


def copy_state(into: LococoState, state: LococoState) -> None:
    """Writes `state` into the tensors of `into`."""
    for name in ("keys", "values", "scores"):
        for target, source in zip(getattr(into, name), getattr(state, name), strict=True):
            target.copy_(source)
    for name in ("length", "position", "logits"):
        getattr(into, name).copy_(getattr(state, name))


def _nll(logits: Tensor, following: Sequence[int]) -> float:
    """Sum of the negative log likelihoods of the tokens that follow: logits (T, V) float32, at most T tokens."""
    if not following:
        return 0.0
    targets = torch.tensor(list(following), device=logits.device)
    return float(F.cross_entropy(logits[: len(targets)].float(), targets, reduction="sum"))


def _compare_logits(ours: Tensor, theirs: Tensor, report: Report) -> str:
    """Updates the worst values; says what is out of tolerance, "" if nothing. Both (T, V) float32."""
    for side, logits in (("", ours), (" in PyTorch", theirs)):
        if bad := int((~torch.isfinite(logits)).sum()):
            return f"{bad:,} of {logits.numel():,} numbers are not finite{side}"
    worst = float((ours - theirs).abs().max())
    cosine = float(torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())
    report.logits_max_abs = max(report.logits_max_abs, worst)
    report.logits_cosine = min(report.logits_cosine, cosine)
    t = report.tolerance
    if not worst <= t.logits_max_abs:
        return f"max abs difference {worst:.3g}, at most {t.logits_max_abs:g}"
    if not cosine >= t.logits_cosine:
        return f"cosine {cosine:.7f}, at least {t.logits_cosine:g}"
    return ""
