"""Block-wise reading against the reference, the baselines against hand-worked cases, and losses and their gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lococo_calibration import evaluate
from lococo_calibration.blocks import (
    BlockReader,
    FullCache,
    Fusion,
    Policy,
    Slots,
    Streaming,
    plan_forwards,
    read_uncompressed,
)
from lococo_calibration.evaluate import (
    PolicySession,
    check_contexts,
    difference_table,
    paired_difference,
    perplexity_rows,
    read_forwards,
    window_nll,
)
from lococo_calibration.generate import generate
from lococo_calibration.heads import TrainableHead, initial_heads
from lococo_calibration.losses import Losses
from lococo_calibration.settings import FitSettings, TrainingPlan, training_plan
from lococo_runtime import InvalidArgumentError
from lococo_runtime._exceptions import ConfigError
from lococo_runtime.bundle import LococoConfig
from tiny_models import make_model, random_heads, small_cache
from torch import nn

from lococo_export.checkpoints import Checkpoint, load_checkpoint
from lococo_export.reference import ReferenceModel, ReferenceSession, rotate

VOCAB, CONTEXT = 96, 70


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return load_checkpoint(path, policy="h2o", mem_size=12, block_size=8, buffer=4)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (3, CONTEXT))


def with_heads_of(base: Checkpoint, cache: LococoConfig) -> Checkpoint:
    heads = random_heads(base.geometry, cache) if cache.policy == "lococo" else ()
    return dataclasses.replace(base, config=cache, heads=heads)


def with_heads(base: Checkpoint, cache: LococoConfig) -> ReferenceModel:
    return ReferenceModel(with_heads_of(base, cache))


def policy_of(model: ReferenceModel) -> Fusion:
    return Fusion(model.cache, model.heads)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plan_of_blocks() -> None:
    plan = plan_forwards(30, 8, 16, 12)
    assert [(f.start, f.stop, f.past, f.fuses) for f in plan] == [
        (0, 8, 0, False),
        (8, 16, 8, False),
        (16, 24, 16, True),  # 24 columns are more than 16
        (24, 30, 12, True),
    ]


def test_plan_of_steps_fuses_every_buffer_plus_one() -> None:
    plan = plan_forwards(40, 8, 16, 12, step_from=24)
    assert [(f.start, f.stop, f.past, f.stepwise, f.fuses) for f in plan[3:]] == [
        (24, 29, 12, True, True),
        (29, 34, 12, True, True),
        (34, 39, 12, True, True),
        (39, 40, 12, True, False),
    ]


# --- reading ----------------------------------------------------------------------------------------------------------

CACHES = {
    "lococo": small_cache(activation="none"),
    "accumulated": small_cache(score_decay=1.0, activation="none"),
    "decayed by token": small_cache(score_decay=0.8, decay_per="token", activation="none"),
    "decayed": small_cache(score_decay=0.7, num_conv_layers=2, conv_expand=2),
    "h2o": LococoConfig.h2o(12, 8, buffer=4),
}


@pytest.mark.parametrize("step_from", [None, 16, 24], ids=["blocks", "steps", "steps-after-fusion"])
@pytest.mark.parametrize("name", CACHES)
def test_reads_as_the_reference(base: Checkpoint, windows: np.ndarray, name: str, step_from: int | None) -> None:
    """Tokens between two fusions read at once give what the reference gives one token at a time."""
    model = with_heads(base, CACHES[name])
    session = ReferenceSession(model, len(windows))
    split = CONTEXT if step_from is None else step_from
    expected = [session.prefill(torch.from_numpy(windows[:, :split]), return_all=True)]
    expected += [session.step(torch.from_numpy(ids))[:, None] for ids in windows[:, split:].T]
    hidden = torch.cat(
        [h for _, h in read_forwards(model, policy_of(model), torch.from_numpy(windows), 8, step_from)], 1
    )
    torch.testing.assert_close(model.lm_head(hidden), torch.cat(expected, 1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CACHES)
def test_a_session_goes_on_as_the_reference(base: Checkpoint, windows: np.ndarray, name: str) -> None:
    model = with_heads(base, CACHES[name])
    mine, reference = PolicySession(model, policy_of(model), 8), ReferenceSession(model, len(windows))
    for a, b in ((0, 21), (21, 22), (22, 23), (23, 40), (40, 41)):
        ids = torch.from_numpy(windows[:, a:b])
        expected = reference.prefill(ids, return_all=True)
        torch.testing.assert_close(mine.read(ids), expected, atol=2e-5, rtol=1e-4)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("name", [*CACHES, "streaming", "full"])
def test_prompts_side_by_side_are_prompts_alone(base: Checkpoint, name: str, device: str) -> None:
    """Prompts of many lengths, and answers of many lengths, as a session with one prompt gives them."""
    model = ReferenceModel(with_heads_of(base, CACHES.get(name, CACHES["h2o"])), device=device)
    others: dict[str, Policy] = {"streaming": Streaming(model, 12, 4), "full": FullCache()}
    policy = others.get(name) or policy_of(model)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in (2, 70, 8, 13, 41, 40, 70, 3, 22, 17)]
    limits = [30, 40, 40, 1, 35, 40, 7, 40, 40, 12]
    ends = model.geometry.eos_token_ids
    alone = []
    for prompt, limit in zip(prompts, limits, strict=True):
        session = PolicySession(model, policy, 8)
        logits, found = session.read(torch.tensor([prompt], device=device)), []
        while len(found) < limit and (token := int(logits[0, -1].argmax())) not in ends:
            found.append(token)
            logits = session.read(torch.tensor([[token]], device=device))
        alone.append(found)
    assert len(set(map(len, alone))) > 3
    assert generate(model, policy, prompts, limits, block_size=8, batch=3) == alone
    cut = [found[: found.index(found[2]) + 1] if len(found) > 2 else found for found in alone]
    stop = lambda number, found: len(alone[number]) > 2 and found[-1] == alone[number][2]  # noqa: E731
    assert generate(model, policy, prompts, limits, block_size=8, stop=stop) == cut


def test_generation_refuses_nothing_to_read(base: Checkpoint) -> None:
    model = ReferenceModel(base)
    assert generate(model, FullCache(), [], [], block_size=8) == []
    for prompts, limits in (([[3], []], [1, 1]), ([[3]], [0])):
        with pytest.raises(InvalidArgumentError, match="at least 1 new token"):
            generate(model, FullCache(), prompts, limits, block_size=8)


def test_full_cache_is_one_causal_forward(base: Checkpoint, windows: np.ndarray) -> None:
    model = with_heads(base, LococoConfig.h2o(CONTEXT, CONTEXT))
    expected = ReferenceSession(model, len(windows)).prefill(torch.from_numpy(windows), return_all=True)
    hidden = torch.cat([h for _, h in read_forwards(model, FullCache(), torch.from_numpy(windows), 8)], 1)
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=2e-5, rtol=1e-4)
    hidden = read_uncompressed(model, torch.from_numpy(windows))
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=2e-5, rtol=1e-4)


def test_nll_is_that_of_the_logits(base: Checkpoint, windows: np.ndarray) -> None:
    model = with_heads(base, CACHES["lococo"])
    logits = ReferenceSession(model, len(windows)).prefill(torch.from_numpy(windows), return_all=True)
    expected = -logits.log_softmax(-1)[:, :-1].gather(2, torch.from_numpy(windows)[:, 1:, None])[..., 0]
    nll = window_nll(model, policy_of(model), windows, block_size=8, batch=2)
    np.testing.assert_allclose(nll, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", [*CACHES, "streaming"])
def test_replayed_forwards_of_decoding_are_the_launched_ones(
    base: Checkpoint, windows: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a graph is stood in for by what it captured, computed anew at every replay."""
    model = with_heads(base, CACHES.get(name, CACHES["h2o"]))
    policy = policy_of(model) if name in CACHES else Streaming(model, 12, 4)
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(self)
            captured[self]._nll = compute(captured[self])

    def capture(self: evaluate._GraphedForward) -> torch.Tensor:
        captured[self._graph] = self
        return self._ids

    compute, captured = evaluate._GraphedForward._compute, {}
    monkeypatch.setattr(evaluate._GraphedForward, "_compute", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    launched, replayed = (
        window_nll(model, policy, windows, block_size=8, step_from=16, batch=2, graphs=g) for g in (False, True)
    )
    assert len(captured) == 2  # a graph a batch
    assert len(replays) > 2
    np.testing.assert_array_equal(replayed, launched)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["lococo", "h2o", "streaming"])
def test_replays_on_a_gpu(base: Checkpoint, windows: np.ndarray, name: str) -> None:
    cache = CACHES.get(name, CACHES["h2o"])
    model = ReferenceModel(with_heads_of(base, cache), device="cuda")
    policy = policy_of(model) if name in CACHES else Streaming(model, 12, 4)
    launched, replayed = (
        window_nll(model, policy, windows, block_size=8, step_from=16, graphs=g) for g in (False, True)
    )
    np.testing.assert_allclose(replayed, launched, atol=1e-5)


def test_perplexity_counts_the_second_half_of_a_context() -> None:
    nll = np.log(np.array([[9.0, 9, 9, 2, 8, 2, 8], [9, 9, 9, 4, 4, 4, 4]], np.float32))  # 8 tokens
    rows = perplexity_rows(nll, [8], ["a", "b"], policy="full", mem_size=0, regime="block", backend="pytorch")
    assert rows[0].tokens == 8
    assert rows[0].perplexity == pytest.approx(4.0)
    assert rows[0].by_document == pytest.approx({"a": 4.0, "b": 4.0})
    assert rows[0].window_nll == pytest.approx([math.log(4)] * 2)


def test_differences_are_paired_by_window() -> None:
    """Windows differ by far more than policies do on one of them."""
    percent, error = paired_difference([1.01, 5.01, 9.04], [1.0, 5.0, 9.0])
    assert percent == pytest.approx(100 * math.expm1(0.02))
    assert error == pytest.approx(100 * np.std([0.01, 0.01, 0.04], ddof=1) / math.sqrt(3))
    assert math.isnan(paired_difference([1.0], [2.0])[1])

    nll = {"lococo": [1.0, 2.0], "h2o": [1.1, 2.1], "full": [0.9, 1.9]}
    rows = []
    for policy, size, regime in (("full", 0, "block"), ("lococo", 4, "step"), ("h2o", 4, "step"), ("h2o", 6, "step")):
        each = np.repeat(np.float32(nll[policy])[:, None], 7, 1)
        what = {"policy": policy, "mem_size": size, "regime": regime, "backend": "pytorch"}
        rows += perplexity_rows(each, [8], ["a", "b"], **what)
    lines = difference_table(rows).splitlines()
    assert len(lines) == 4  # not another M
    assert [c.strip() for c in lines[2].split("|")[1:-1]] == ["full", "4", "step", "+10.52 % ± 0.00"]
    assert [c.strip() for c in lines[3].split("|")[1:-1]] == ["h2o", "4", "step", "-9.52 % ± 0.00"]
    assert difference_table(rows[:1]) == ""


# --- H2O and StreamingLLM by hand -------------------------------------------------------------------------------------


def columns(*numbers: float) -> torch.Tensor:
    """Keys or values of one sequence, one head, two channels, each column its number."""
    return torch.tensor(numbers)[None, None, :, None].expand(-1, -1, -1, 2)


def test_h2o_keeps_heavy_hitters_and_recent_tokens() -> None:
    """M=4: of 7 columns the last two are recent; 1 and 3 have the highest scores of the others."""
    policy = Fusion(LococoConfig.h2o(4, 4, buffer=0))
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.3, 5.0, 0.0]]])
    slots = policy.compress(0, Slots(columns(*range(7)), columns(*range(10, 17)), scores), 7)
    assert slots.key[0, 0, :, 0].tolist() == [1, 3, 5, 6]
    assert slots.value[0, 0, :, 0].tolist() == [11, 13, 15, 16]
    torch.testing.assert_close(slots.scores, torch.tensor([[[0.9, 0.8, 5.0, 0.0]]]))


def test_h2o_accumulates_scores(base: Checkpoint, windows: np.ndarray) -> None:
    """A column's score is the attention it received from every query so far, not from the last forward alone."""
    model = with_heads(base, LococoConfig.h2o(40, 8, buffer=0))
    ids = torch.from_numpy(windows[:, :16])
    received: list[torch.Tensor] = []
    for split in ([8, 8], [16]):
        reader, start = BlockReader(model, policy_of(model)), 0
        for n in split:
            (forward,) = plan_forwards(n, n, None, 0)
            reader.read(ids[:, start : start + n], dataclasses.replace(forward, past=start))
            start += n
        received.append(reader.slots[0].scores)
    torch.testing.assert_close(received[0], received[1])
    # a query hands out 1 for every head; two query heads share a column's head
    torch.testing.assert_close(received[0].sum(-1), torch.full((3, 2), 2.0 * 16))


def test_streaming_keeps_sinks_and_recent_tokens(base: Checkpoint) -> None:
    model = ReferenceModel(base)
    policy = Streaming(model, mem_size=6, buffer=0, num_sinks=2)
    raw = torch.randn(1, 2, 9, 8)

    def turned(position: int, column: int) -> torch.Tensor:
        cos, sin = model.rotary(torch.tensor([position]), 1)
        return rotate(raw[:, :, column : column + 1], cos, sin)

    keys = torch.cat([turned(i, i) for i in range(9)], 2)
    slots = policy.compress(0, Slots(keys, columns(*range(9)).expand(-1, 2, -1, -1), torch.zeros(1, 2, 9)), 9)
    assert slots.value[0, 0, :, 0].tolist() == [0, 1, 5, 6, 7, 8]
    # the next token's query stands at 9 here; renumbered within the cache it would stand at 6, the columns at 0 to 5
    query = torch.randn(1, 2, 1, 8)
    cos, sin = model.rotary(torch.tensor([9]), 1)
    found = rotate(query, cos, sin) @ slots.key.transpose(2, 3)
    renumbered = torch.cat([turned(i, c) for i, c in enumerate([0, 1, 5, 6, 7, 8])], 2)
    cos, sin = model.rotary(torch.tensor([6]), 1)
    torch.testing.assert_close(found, rotate(query, cos, sin) @ renumbered.transpose(2, 3), atol=1e-5, rtol=1e-5)


def test_streaming_turns_sinks_from_where_they_were_read(base: Checkpoint, windows: np.ndarray) -> None:
    """Thousands of evictions in half precision do not wear the sinks out: their length stays."""
    model = ReferenceModel(base, torch.bfloat16)
    policy = Streaming(model, mem_size=8, buffer=0)
    key = torch.randn(1, 2, 9, 8).bfloat16()
    slots = Slots(key, key, torch.zeros(1, 2, 9))
    for position in range(9, 2000):
        slots = policy.compress(0, slots, position)
        grown = [torch.cat([x, x[:, :, -1:]], 2) for x in (slots.key, slots.value, slots.scores)]
        slots = Slots(grown[0], grown[1], grown[2], slots.sinks)
    lengths = [x[:, :, :4].float().norm(dim=-1) for x in (slots.key, key)]
    torch.testing.assert_close(lengths[0], lengths[1], atol=0.02, rtol=0.01)


class OneLayer:
    """A model of one layer in NumPy: what H2O and StreamingLLM do, written out with sets of token numbers."""

    def __init__(self, path: Path) -> None:
        make_model(path, num_hidden_layers=1)
        self.model = ReferenceModel(load_checkpoint(path, policy="h2o", mem_size=12, block_size=8, buffer=4))
        g = self.model.geometry
        self.group, self.num_kv, self.d = g.num_heads // g.num_kv_heads, g.num_kv_heads, g.head_dim

    def turned(self, x: np.ndarray, position: int) -> np.ndarray:
        angle = position * 10000.0 ** (-np.arange(0, self.d, 2) / self.d)
        a, b = x[: self.d // 2], x[self.d // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def nll(self, ids: torch.Tensor, keep: Any, within_cache: bool, forwards: list[int], capacity: int) -> np.ndarray:
        """Of ids (T,); `keep` chooses from token numbers and their scores once there are more than `capacity`."""
        layer, tokens = self.model.model.layers[0], len(ids)
        attention: Any = layer.self_attn
        with torch.no_grad():
            x = self.model.model.embed_tokens(ids[None])
            h = layer.input_layernorm(x)
            q, k, v = (f(h)[0].view(tokens, -1, self.d).double().numpy()
                       for f in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
        mixed = np.zeros_like(q)
        for head in range(self.num_kv):
            kept: list[int] = []
            score = np.zeros(tokens)
            start = 0
            for n in forwards:
                for i in range(start, start + n):
                    seen = kept + list(range(start, i + 1))
                    places = range(len(seen)) if within_cache else seen
                    keys = np.stack([self.turned(k[j, head], c) for j, c in zip(seen, places, strict=True)])
                    for query_head in range(head * self.group, (head + 1) * self.group):
                        z = keys @ self.turned(q[i, query_head], places[-1]) / np.sqrt(self.d)
                        weights = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                        mixed[i, query_head] = weights @ v[seen, head]
                        score[seen] += weights
                kept += range(start, start + n)
                kept = keep(kept, score) if len(kept) > capacity else kept
                start += n
        with torch.no_grad():
            x = x + attention.o_proj(torch.from_numpy(mixed).float().view(1, tokens, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            logits = self.model.lm_head(self.model.model.norm(x))[0]
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()


@pytest.mark.parametrize(("mem_size", "buffer", "step_from"), [(12, 4, None), (13, 0, 16), (12, 4, 8)])
def test_baselines_are_what_their_papers_say(
    tmp_path: Path, windows: np.ndarray, mem_size: int, buffer: int, step_from: int | None
) -> None:
    """H2O: half of what stays has the highest sums of attention, the rest is recent (arXiv 2306.14048, section 4).
    StreamingLLM: four sinks and what is recent, numbered by their place in the cache (arXiv 2309.17453, section 3.2).
    """
    one = OneLayer(tmp_path)
    recent = mem_size // 2

    def heavy_and_recent(tokens: list[int], score: np.ndarray) -> list[int]:
        old = tokens[:-recent]
        return sorted(sorted(old, key=lambda j: -score[j])[: mem_size - recent]) + tokens[-recent:]

    def sinks_and_recent(tokens: list[int], score: np.ndarray) -> list[int]:
        return tokens[:4] + tokens[4 - mem_size :]

    forwards = [8] * 8 + [6] if step_from is None else [8] * (step_from // 8) + [1] * (CONTEXT - step_from)
    ids = torch.from_numpy(windows[0])
    for policy, keep in ((Fusion(LococoConfig.h2o(mem_size, 8, buffer)), heavy_and_recent),
                         (Streaming(one.model, mem_size, buffer), sinks_and_recent)):  # fmt: skip
        found = window_nll(one.model, policy, windows[:1], block_size=8, step_from=step_from)[0]
        expected = one.nll(ids, keep, policy.name == "streaming", forwards, mem_size + buffer)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("policy", [Fusion(CACHES["h2o"]), Fusion(LococoConfig.h2o(12, 64))])
def test_contexts_without_fusion_are_refused(policy: Policy) -> None:
    check_contexts([200], policy, policy.cache.block_size)  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError, match="no fusion ever happens"):
        check_contexts([16], policy, policy.cache.block_size)  # type: ignore[attr-defined]


# --- losses -----------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> FitSettings:
    small: dict[str, Any] = {
        "model": "m", "text": ("t",), "output": "o", "mem_size": 12, "local_len": 3, "block_size": 8, "buffer": 4,
        "kernel_size": 5, "context": CONTEXT, "batch": 3, "decode_fusions": 3, "device": "cpu",
    }  # fmt: skip
    return FitSettings(**{**small, **changes})


LOSSES = {
    "reconstruction": {},
    "next-token": {"reconstruction_weight": 0.0, "lm_weight": 1.0},
    "distillation": {"reconstruction_weight": 0.0, "distill_weight": 1.0},
}


def gradients(base: Checkpoint, windows: np.ndarray, s: FitSettings) -> tuple[nn.ModuleList, Losses, TrainingPlan]:
    model = ReferenceModel(base)
    start = initial_heads(base.geometry, s.cache, seed=1, std=0.3, normalizer=0.5)
    heads = nn.ModuleList(TrainableHead(h, torch.float32) for h in start)
    losses, plan = Losses(model, heads, s), training_plan(s, 0)
    losses.backward(torch.from_numpy(windows), plan, 1.0, losses.new())
    return heads, losses, plan


@pytest.mark.parametrize("regime", ["block", "step"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("convs", [1, 2])
def test_gradients_reach_every_parameter(
    base: Checkpoint, windows: np.ndarray, kind: str, regime: str, convs: int
) -> None:
    s = settings(decode_share=float(regime == "step"), num_conv_layers=convs, conv_expand=2, **LOSSES[kind])
    heads, _, plan = gradients(base, windows, s)
    assert plan.regime == regime
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        # a constant added to all logits of a slot cancels in its softmax: a last bias has no gradient
        if not name.endswith(f"biases.{convs - 1}"):
            assert parameter.grad.abs().max() > 1e-9, name


def test_reconstruction_loss_by_its_definition(base: Checkpoint, windows: np.ndarray) -> None:
    """The whole graph at once, without truncation, gives the same loss and gradient as segments as long as it."""
    s = settings(decode_share=0.0, bptt=100)
    heads, losses, plan = gradients(base, windows, s)
    found = [p.grad.clone() for p in heads.parameters() if p.grad is not None]
    heads.zero_grad()
    model, ids = losses.model, torch.from_numpy(windows)
    total = torch.zeros(())

    def layer(i: int, attention: Any, q: Any, k: Any, v: Any, target: Any) -> None:
        nonlocal total
        with torch.enable_grad():
            slots = None
            for f in plan.forwards:
                part = slice(f.start, f.stop)
                key, value = k[:, :, part], v[:, :, part]
                if slots is not None:
                    key, value = torch.cat([slots.key, key], 2), torch.cat([slots.value, value], 2)
                visible = torch.ones(f.stop - f.start, key.shape[2], dtype=torch.bool).tril(f.past)[None]
                out, scores = attention.attend(q[:, :, part], key, value, visible, torch.ones(1, f.stop - f.start))
                if f.past == 12:  # after a fusion
                    total = (
                        total + ((out - target[:, part]).square() / target.square().mean((1, 2), keepdim=True)).sum()
                    )
                slots = Slots(key, value, scores.detach())
                if f.fuses and f is not plan.forwards[-1]:
                    slots = losses.policy.compress(i, slots, f.stop)

    read_uncompressed(model, ids, layer)
    (total / (len(ids) * plan.scored_tokens * model.geometry.hidden_size)).backward()
    for expected, got in zip((p.grad for p in heads.parameters()), found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)


def test_truncation_changes_gradients_not_losses(base: Checkpoint, windows: np.ndarray) -> None:
    found = {}
    for bptt in (1, 100):
        s = settings(decode_share=0.0, bptt=bptt, lm_weight=1.0)
        heads, losses, plan = gradients(base, windows, s)
        total = losses.new()
        losses.backward(torch.from_numpy(windows), plan, 1.0, total)
        found[bptt] = (total, [p.grad for p in heads.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1][0].layers, found[100][0].layers)
    torch.testing.assert_close(found[1][0].lm, found[100][0].lm)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(found[1][1], found[100][1], strict=True))


def test_checkpointing_gives_the_same_gradients(base: Checkpoint, windows: np.ndarray) -> None:
    grads = []
    for checkpointing in (False, True):
        s = settings(checkpointing=checkpointing, distill_weight=0.5, lm_weight=0.5, decode_share=0.0)
        heads, _, _ = gradients(base, windows, s)
        grads.append([p.grad for p in heads.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_next_token_loss_is_that_of_evaluation(base: Checkpoint, windows: np.ndarray) -> None:
    s = settings(decode_share=0.0, reconstruction_weight=0.0, lm_weight=1.0, distill_weight=1.0)
    _, losses, plan = gradients(base, windows, s)
    total = losses.new()
    losses.backward(torch.from_numpy(windows), plan, 1.0, total)
    nll = window_nll(losses.model, losses.policy, windows, block_size=8)
    first = plan.tokens - plan.scored_tokens
    assert float(total.lm) == pytest.approx(float(nll[:, first:].mean()), rel=1e-5)
    assert float(total.distill) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 16}, "no fusion is followed by tokens"),
        ({"mem_size": 80, "local_len": 8}, "no fusion is followed by tokens"),
        ({"decode_share": 0.5, "decode_blocks": 9}, "decode_blocks: expected at most"),
    ],
)
def test_windows_without_fusion_are_refused(changes: dict[str, Any], message: str) -> None:
    from lococo_calibration.settings import check_plans

    with pytest.raises(ConfigError, match=message):
        check_plans(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstruction_weight": 0.0}, "expected one above 0"),
        ({"bptt": 0}, "bptt: expected at least 1"),
        ({"steps": "many"}, "steps: expected int"),
        ({"tune": "norms"}, "tune: expected a list of strings, got 'norms'"),
        ({"text": [1]}, "text: expected a list of strings"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"held_out": 0.0}, "--eval-every 0"),
        ({"text": ()}, "expected --text"),
        ({"lr": float("nan")}, "lr: expected 0 or more"),
        ({"decode_share": 1.5}, "decode_share: expected 0 to 1"),
        ({"seed": 1 << 63}, r"seed: expected less than 2\^63"),
        ({"init_normalizer": float("nan")}, "init_normalizer: expected 0 to 1"),
        ({"checkpointing": True}, "checkpointing: reconstruction goes through one layer"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_plans_of_decoding_fit_the_window() -> None:
    s = settings(decode_share=1.0)
    plans = [training_plan(s, step) for step in range(50)]
    assert all(p.tokens <= CONTEXT and p.regime == "step" for p in plans)
    assert all(sum(p.trains(f) for f in p.forwards) == s.decode_fusions for p in plans)
    assert len({p.trains_from for p in plans}) > 1
    plans = [training_plan(dataclasses.replace(s, decode_blocks=2), step) for step in range(20)]
    assert all(p == plans[0] for p in plans)
    assert plans[0].trains_from == 16
