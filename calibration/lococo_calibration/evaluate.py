"""What a cache policy costs: perplexity by context length, and passkey retrieval by depth.

The same windows are read by every policy, on PyTorch or by the runtime. Perplexity at context c is over the tokens
with c/2 to c - 1 tokens before them, so that a line over c shows what longer contexts bring or cost.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lococo_runtime import InvalidArgumentError, Session
from torch import Tensor

from lococo_export.reference import ReferenceModel

from .blocks import BlockReader, Forward, Policy, Slots, plan_forwards
from .data import Corpus, Window

Progress = Callable[[int, int], None]
LOGITS_AT_ONCE = 2048
"""Tokens whose logits are held at once: 400 MB in float32 for a vocabulary of 49,152."""

PASSKEY_INTRO = "Somewhere in the text below a pass key is mentioned. Find it and remember it.\n\n"
PASSKEY_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
PASSKEY_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
PASSKEY_QUESTION = "\n\nWhat is the pass key? The pass key is"


def read_forwards(
    model: ReferenceModel, policy: Policy, ids: Tensor, block_size: int, step_from: int | None = None
) -> Iterator[tuple[Forward, Tensor]]:
    """Forwards over ids (B, T) and the hidden states (B, n, hidden) of their tokens."""
    plan = plan_forwards(ids.shape[1], block_size, policy.capacity, policy.mem_size, step_from)
    reader = BlockReader(model, policy)
    for forward in plan:
        yield forward, reader.read(ids[:, forward.start : forward.stop], forward)
        if forward.fuses and forward is not plan[-1]:
            reader.compress()


class PolicySession:
    """Sequences that go on as they are read, when their length is not known before: generation.

    Args:
        block_size: tokens of one forward.
    """

    def __init__(self, model: ReferenceModel, policy: Policy, block_size: int) -> None:
        self.policy, self.block_size = policy, block_size
        self._reader = BlockReader(model, policy)
        self.live = 0
        """Columns of every row's cache."""

    @property
    def slots(self) -> list[Slots]:
        """The caches, one a layer."""
        return self._reader.slots

    @property
    def position(self) -> int:
        """Tokens read."""
        return int(self._reader.position)

    @torch.inference_mode()
    def forwards(self, ids: Tensor) -> Iterator[Tensor]:
        """Hidden states (B, n, hidden) of ids (B, T), forward by forward."""
        policy, reader = self.policy, self._reader
        for part in torch.split(ids, self.block_size, 1):
            n, start = part.shape[1], self.position
            fuses = policy.capacity is not None and self.live + n > policy.capacity
            yield reader.read(part, Forward(start, start + n, self.live, False, fuses))
            self.live = policy.mem_size if fuses else self.live + n
            if fuses:
                reader.compress()

    @torch.inference_mode()
    def read(self, ids: Tensor, *, last_only: bool = False) -> Tensor:
        """Logits (B, T, V) float32 of ids (B, T); (B, 1, V) of the last one alone with `last_only`."""
        hidden = collections.deque(self.forwards(ids), maxlen=1 if last_only else None)
        kept = hidden[-1][:, -1:] if last_only else torch.cat(list(hidden), 1)
        logits: Tensor = self._reader.model.lm_head(kept).float()
        return logits

    def rows(self, rows: list[int]) -> PolicySession:
        """Some of the sequences, to go on apart from the others."""
        part = PolicySession(self._reader.model, self.policy, self.block_size)
        part._reader.slots = [slots.rows(rows) for slots in self.slots]
        part._reader.position, part.live = self.position, self.live
        return part


def window_nll(
    model: ReferenceModel,
    policy: Policy,
    windows: npt.NDArray[np.int64],
    *,
    block_size: int,
    step_from: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    graphs: bool | None = None,
) -> npt.NDArray[np.float32]:
    """Negative log-likelihood in nats of every token but the first of windows (N, T): (N, T - 1).

    Args:
        step_from: tokens from here on are read one by one, as decoding does; None reads blocks to the end.
        graphs: replay the forwards of decoding, which are many and alike, as a CUDA graph; None does on a GPU.
    """
    parts = []
    graphs = model.device.type == "cuda" if graphs is None else graphs
    plan = plan_forwards(windows.shape[1], block_size, policy.capacity, policy.mem_size, step_from)
    with torch.inference_mode():
        for first in range(0, len(windows), batch):
            ids = torch.from_numpy(windows[first : first + batch]).to(model.device)
            reader = BlockReader(model, policy)
            graph: _GraphedForward | None = None
            columns = []
            for before, forward in itertools.pairwise([plan[0], *plan]):
                part, targets = (ids[:, forward.start + i : forward.stop + i] for i in (0, 1))
                if graph is None and graphs and before is not forward and _GraphedForward.suits(before, forward):
                    graph = _GraphedForward(reader, forward, part)
                if graph and targets.shape == part.shape and _GraphedForward.suits(graph.forward, forward):
                    columns.append(graph.read(part, targets))
                else:
                    if graph:
                        graph.leave()
                        graph = None
                    hidden = reader.read(part, forward)
                    columns.append(token_nll(model, hidden[:, : targets.shape[1]], targets))
                    if forward.fuses and forward is not plan[-1]:
                        reader.compress()
                if progress:
                    progress(first * ids.shape[1] + len(ids) * forward.stop, windows.size)
            parts.append(torch.cat(columns, 1).cpu().numpy())
    return np.concatenate(parts)


class _GraphedForward:
    """A forward of decoding with the fusion that ends it, captured once and replayed on the next tokens.

    Args:
        reader: has read a forward like this one, and stands before it; its caches are copied.
        ids: (B, n), tokens of this forward.
    """

    def __init__(self, reader: BlockReader, forward: Forward, ids: Tensor) -> None:
        self.forward, self._reader = forward, reader
        self._ids, self._targets = ids.clone(), ids.clone()
        self._position = torch.full((1,), int(reader.position), device=ids.device)
        self._slots = [
            Slots(s.key.clone(), s.value.clone(), s.scores.clone(), None if s.sinks is None else s.sinks.clone())
            for s in reader.slots
        ]
        # the forward before has warmed up the libraries; capturing computes nothing
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._nll = self._compute()

    def _compute(self) -> Tensor:
        reader = BlockReader(self._reader.model, self._reader.policy)
        reader.slots, reader.position = list(self._slots), self._position
        nll = token_nll(reader.model, reader.read(self._ids, self.forward), self._targets)
        reader.compress()
        for mine, new in zip(self._slots, reader.slots, strict=True):
            mine.key.copy_(new.key)
            mine.value.copy_(new.value)
            mine.scores.copy_(new.scores)
        self._position += self._ids.shape[1]
        return nll

    @staticmethod
    def suits(one: Forward, other: Forward) -> bool:
        """Both are forwards of decoding of one shape, and a fusion follows."""
        shapes = [(f.stop - f.start, f.past, f.stepwise, f.fuses) for f in (one, other)]
        return shapes[0] == shapes[1] and one.stepwise and one.fuses

    def read(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (B, n) of targets (B, n), which follow ids (B, n)."""
        self._ids.copy_(ids)
        self._targets.copy_(targets)
        self._graph.replay()
        return self._nll.clone()

    def leave(self) -> None:
        """The caches as they are now, back to the reader."""
        self._reader.slots, self._reader.position = self._slots, int(self._position)


def token_nll(model: ReferenceModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(B, n) float32 from hidden states (B, n, hidden) and the tokens that follow (B, n)."""
    pieces = zip(*(torch.split(x.flatten(0, 1), LOGITS_AT_ONCE) for x in (hidden, targets)), strict=True)
    nll = [F.cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in pieces]
    return torch.cat(nll).view(targets.shape)


def session_nll(
    session: Session,
    windows: npt.NDArray[np.int64],
    *,
    step_from: int | None = None,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """As `window_nll`, by the runtime; one window after the other."""
    tokens = windows.shape[1]
    block = session.model.manifest.cache.block_size
    stop = tokens if step_from is None else min(step_from, tokens)
    nll = np.empty((len(windows), tokens - 1), np.float32)
    for row, ids in enumerate(windows):
        session.reset()
        for start in [*range(0, stop, block), *range(stop, tokens)]:
            if start < stop:
                logits = session.prefill(ids[start : min(start + block, stop)], return_all=True)
            else:
                logits = session.step(int(ids[start]))[None]
            targets = ids[start + 1 : start + 1 + len(logits)]
            wide = logits[: len(targets)].astype(np.float64)
            top = wide.max(-1)
            total = top + np.log(np.exp(wide - top[:, None]).sum(-1))
            nll[row, start : start + len(targets)] = total - wide[np.arange(len(targets)), targets]
            if progress:
                progress(row * tokens + start + len(logits), windows.size)
    return nll


# --- perplexity by context --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerplexityRow:
    """One policy at one context."""

    policy: str
    mem_size: int  # 0 for the full cache
    regime: str  # "block" or "step"
    backend: str  # "pytorch" or "onnxruntime"
    context: int
    tokens: int
    nll: float
    perplexity: float
    by_document: dict[str, float]
    window_nll: list[float]
    """Mean of each window, in nats a token."""


def perplexity_rows(
    nll: npt.NDArray[np.float32], contexts: Sequence[int], documents: Sequence[str], **what: Any
) -> list[PerplexityRow]:
    """Summaries of nll (N, T - 1), whose windows come from `documents` (N)."""
    rows = []
    for context in contexts:
        part = nll[:, context // 2 - 1 : context - 1].astype(np.float64)
        names = np.array(documents)
        by_document = {name: math.exp(part[names == name].mean()) for name in sorted(set(documents))}
        mean = float(part.mean())
        rows.append(PerplexityRow(**what, context=context, tokens=part.size, nll=mean, perplexity=math.exp(mean),
                                  by_document=by_document, window_nll=part.mean(1).tolist()))  # fmt: skip
    return rows


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """How much smaller or larger a perplexity is than another on the same windows, and the standard error of that.

    Args:
        ours, theirs: `window_nll` of each, in nats a token.

    Returns:
        Both in percent; the error is nan with fewer than two windows.
    """
    d = np.subtract(ours, theirs)
    error = float(d.std(ddof=1)) / math.sqrt(d.size) if d.size > 1 else math.nan
    return 100 * math.expm1(float(d.mean())), 100 * error


def choose_windows(corpus: Corpus, context: int, count: int, documents: Sequence[int] | None = None) -> list[Window]:
    """At most `count` windows, taken in turn from every document, from its start on."""
    by_document: dict[int, list[Window]] = {}
    for window in corpus.windows(context, documents):
        by_document.setdefault(window[0], []).append(window)
    rounds = max(len(w) for w in by_document.values())
    turns = [w[i] for i in range(rounds) for w in by_document.values() if i < len(w)]
    return sorted(turns[:count])


def check_contexts(contexts: Sequence[int], policy: Policy, block_size: int) -> None:
    """Refuses contexts in which the policy never gets to compress anything that is read afterwards.

    Raises:
        InvalidArgumentError: mem_size is larger than the text.
    """
    for context in contexts:
        plan = plan_forwards(context, block_size, policy.capacity, policy.mem_size)
        if policy.capacity is not None and not any(f.fuses for f in plan[:-1]):
            raise InvalidArgumentError(
                f"context {context}: expected more than M + buffer = {policy.capacity} tokens and a block to read"
                f" after them, or no fusion ever happens (mem_size={policy.mem_size}, block_size={block_size}); raise"
                " the context or lower M"
            )


# --- passkey ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PasskeyPrompt:
    """Tokens that end where the answer begins."""

    ids: list[int]
    answer: list[int]
    depth: float  # 0: the key stands at the start, 1: just before the question


@dataclass(frozen=True)
class PasskeyRow:
    """One policy at one depth."""

    policy: str
    mem_size: int
    backend: str
    context: int
    depth: float
    trials: int
    correct: int
    haystack: str = "filler"  # "filler": sentences that repeat; "text": documents


def passkey_prompts(
    tokenizer: Any,
    context: int,
    depths: Sequence[float],
    trials: int,
    seed: int,
    haystack: Sequence[Sequence[int]] | None = None,
) -> list[PasskeyPrompt]:
    """Prompts of exactly `context` tokens with a random five-digit key (task of arXiv 2305.16300, own wording).

    Args:
        haystack: tokens of documents to hide the key in, in turn, instead of filler sentences.

    Raises:
        InvalidArgumentError: the context is too short for the question, or a document is shorter than the context.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    rng = np.random.default_rng(seed)
    intro, question, filler = encode(PASSKEY_INTRO), encode(PASSKEY_QUESTION), encode(PASSKEY_FILLER)
    prompts: list[PasskeyPrompt] = []
    for depth in depths:
        for _ in range(trials):
            key = str(rng.integers(10_000, 100_000))
            needle, whole = encode(PASSKEY_NEEDLE.format(key=key)), encode(f"{PASSKEY_QUESTION} {key}")
            answer = whole[len(question) :] if whole[: len(question)] == question else encode(f" {key}")
            room = context - len(intro) - len(needle) - len(question)
            if room < 0:
                raise InvalidArgumentError(f"passkey: expected a context of at least {context - room}, got {context}")
            at = round(depth * room)
            if haystack is None:
                text = (filler * (room // len(filler) + 1))[:room]
                at = at if at == room else at - at % len(filler)  # whole sentences before the key
            else:
                text = list(haystack[len(prompts) % len(haystack)][:room])
                if len(text) < room:
                    raise InvalidArgumentError(f"needle: expected documents of {room} tokens, got {len(text)}")
            prompts.append(PasskeyPrompt([*intro, *text[:at], *needle, *text[at:], *question], answer, depth))
    return prompts


def passkey_model(
    model: ReferenceModel, policy: Policy, prompts: Sequence[PasskeyPrompt], *, block_size: int, batch: int = 8
) -> list[bool]:
    """Whether greedy decoding gives the whole key; prompts of one length."""
    correct: list[bool] = []
    with torch.inference_mode():
        for first in range(0, len(prompts), batch):
            group = prompts[first : first + batch]
            start, width = len(group[0].ids), max(len(p.answer) for p in group)
            # greedy decoding follows the answer as long as it is right, so the answer can be read in its place
            rows = [[*p.ids, *p.answer, *[0] * (width - len(p.answer))][:-1] for p in group]
            ids = torch.tensor(rows, device=model.device)
            best = []
            for forward, hidden in read_forwards(model, policy, ids, block_size, step_from=start):
                keep = hidden[:, max(0, start - 1 - forward.start) :]
                best.append(model.lm_head(keep).argmax(-1))
            found = torch.cat(best, 1).tolist()
            correct += [f[: len(p.answer)] == p.answer for f, p in zip(found, group, strict=True)]
    return correct


def passkey_session(session: Session, prompts: Sequence[PasskeyPrompt]) -> list[bool]:
    """As `passkey_model`, by the runtime."""
    correct = []
    for prompt in prompts:
        session.reset()
        logits = session.prefill(prompt.ids)
        found = []
        for token in prompt.answer:
            found.append(int(logits.argmax()))
            if found[-1] != token:
                break
            logits = session.step(token)
        correct.append(found == prompt.answer)
    return correct


def passkey_rows(prompts: Sequence[PasskeyPrompt], correct: Sequence[bool], **what: Any) -> list[PasskeyRow]:
    """Counts by depth."""
    rows = []
    for depth in sorted({p.depth for p in prompts}):
        hits = [c for p, c in zip(prompts, correct, strict=True) if p.depth == depth]
        rows.append(PasskeyRow(**what, depth=depth, trials=len(hits), correct=sum(hits)))
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def _label(row: PerplexityRow | PasskeyRow) -> tuple[str, ...]:
    regime = (row.regime,) if isinstance(row, PerplexityRow) else ()
    return (row.policy, str(row.mem_size or "-"), *regime, row.backend)


def perplexity_table(rows: Sequence[PerplexityRow]) -> str:
    """Markdown: a line a policy, a column a context."""
    contexts = sorted({r.context for r in rows})
    cells = {(_label(r), r.context): f"{r.perplexity:.3f}" for r in rows}
    return _table(["policy", "M", "regime", "on"], [_label(r) for r in rows], contexts, cells)


def difference_table(rows: Sequence[PerplexityRow]) -> str:
    """Markdown: lococo's perplexity against that of every other policy, in percent, with standard errors; "" for none.

    What lies within two standard errors is decided by a few tokens: an evicted name can cost twelve nats.
    """
    measured = [r for r in rows if r.backend == "pytorch"]
    others = {(r.policy, r.mem_size, r.regime, r.context): r for r in measured if r.policy != "lococo"}
    cells, labels = {}, []
    for r in (r for r in measured if r.policy == "lococo"):
        for policy, mem_size, regime in dict.fromkeys(key[:3] for key in others):
            other = others.get((policy, mem_size, regime, r.context))
            # the full cache has one regime
            if other and (mem_size == 0 or (mem_size, regime) == (r.mem_size, r.regime)):
                percent, error = paired_difference(r.window_nll, other.window_nll)
                label = (policy, str(r.mem_size), r.regime)
                labels.append(label)
                cells[label, r.context] = f"{percent:+.2f} %" + ("" if math.isnan(error) else f" ± {error:.2f}")
    if not cells:
        return ""
    return _table(["lococo against", "M", "regime"], labels, sorted({c for _, c in cells}), cells)


def passkey_table(rows: Sequence[PasskeyRow]) -> str:
    """Markdown: a line a policy and context, a column a depth."""
    depths = sorted({r.depth for r in rows})
    labels = [(*_label(r), str(r.context), r.haystack) for r in rows]
    cells = {(x, r.depth): f"{r.correct}/{r.trials}" for x, r in zip(labels, rows, strict=True)}
    return _table(["policy", "M", "on", "context", "haystack"], labels, depths, cells)


def tasks_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a policy, a column a task and metric."""
    columns = list(dict.fromkeys(f"{r['task']} {r['metric']}" for r in rows))
    labels = [(r["policy"], str(r["mem_size"] or "-")) for r in rows]
    cells = {(x, f"{r['task']} {r['metric']}"): f"{r['value']:.3f}" for x, r in zip(labels, rows, strict=True)}
    return _table(["policy", "M"], labels, columns, cells)


def _table(names: list[str], labels: Sequence[tuple[str, ...]], columns: Sequence[Any], cells: dict[Any, str]) -> str:
    lines = [[*names, *map(str, columns)]]
    lines += [[*label, *(cells.get((label, c), "") for c in columns)] for label in dict.fromkeys(labels)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def as_json(rows: Sequence[PerplexityRow | PasskeyRow]) -> list[dict[str, Any]]:
    """Rows for a JSON document."""
    return [dataclasses.asdict(row) for row in rows]
