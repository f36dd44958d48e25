"""The reference model against the golden cases, transformers' own models, and cases worked by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from conftest import GoldenCase
from lococo_runtime._exceptions import ConfigError, InvalidArgumentError, UnsupportedModelError
from lococo_runtime.bundle import LococoConfig, ModelGeometry
from tiny_models import VARIANTS, make_model, random_heads, small_cache

from lococo_export.checkpoints import Checkpoint, HeadWeights, load_checkpoint
from lococo_export.reference import (
    FusionEvent,
    ReferenceModel,
    ReferenceSession,
    fuse_slots,
    join_columns,
    mixing_logits,
    select,
)
from lococo_export.rope import combine_tables, inverse_frequencies, rope_tables

GEOMETRY = ModelGeometry("llama", 96, 32, 48, 2, 4, 2, 8, 1e-6, {"type": "default", "theta": 10000.0})

# --- golden cases -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Replay:
    """A golden case read by the reference model."""

    prefill_logits: np.ndarray
    decode_logits: np.ndarray
    live_slots: list[int]  # after every forward
    events: dict[int, list[FusionEvent]]  # by forward
    scores: list[list[torch.Tensor]]  # per forward and layer
    session: ReferenceSession


@pytest.fixture(scope="module")
def replay(golden: GoldenCase) -> Replay:
    events: dict[int, list[FusionEvent]] = {}
    scores: list[list[torch.Tensor]] = []
    live: list[int] = []

    def read(ids: np.ndarray) -> np.ndarray:
        result = session.read(torch.from_numpy(ids))
        scores.append(result.scores)
        live.append(session.live_slots)
        return result.logits.numpy()

    model = ReferenceModel(load_checkpoint(golden.path, **golden.load_args))
    batch = golden.io["input_ids"].shape[0]
    session = ReferenceSession(model, batch, lambda e: events.setdefault(len(scores), []).append(e))
    bounds = np.cumsum(golden.chunk_lens)[:-1]
    prefill = [read(chunk) for chunk in np.split(golden.io["input_ids"], bounds, axis=1)]
    decode = [read(ids[:, None]) for ids in golden.io["decode_input_ids"].T]
    return Replay(np.concatenate(prefill, 1), np.concatenate(decode, 1), live, events, scores, session)


def close(got: torch.Tensor | np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    got = np.asarray(got)
    assert got.shape == expected.shape, what
    assert np.abs(got - expected).max(initial=0.0) <= tolerance, what


def test_golden_logits_and_greedy_tokens(golden: GoldenCase, replay: Replay) -> None:
    close(replay.prefill_logits, golden.io["prefill_logits"], 1e-4, "prefill")
    close(replay.decode_logits, golden.io["decode_logits"], 1e-4, "decode")
    np.testing.assert_array_equal(replay.prefill_logits.argmax(-1), golden.io["prefill_logits"].argmax(-1))
    greedy = np.concatenate([replay.prefill_logits[:, -1:], replay.decode_logits], 1).argmax(-1)
    np.testing.assert_array_equal(greedy[:, :-1], golden.io["decode_input_ids"])
    np.testing.assert_array_equal(greedy[:, -1], golden.io["decode_next_id_after_last"])


def test_golden_lengths(golden: GoldenCase, replay: Replay) -> None:
    # the recorded run fuses at the start of a forward, this one at the end of the forward before
    before, after = golden.io["kv_len_before"], golden.io["kv_len_after"]
    tokens = golden.chunk_lens + [1] * golden.io["decode_input_ids"].shape[1]
    np.testing.assert_array_equal(replay.live_slots[:-1], after[1:] - tokens[1:])
    assert replay.live_slots[-1] in (after[-1], golden.args["mem_size"])
    fused_after = [f - 1 for f in golden.io["event_forward"]]
    ended_full = after[-1] > golden.args["mem_size"] + golden.args["buffer"]
    assert sorted(replay.events) == fused_after + [len(tokens) - 1] * bool(ended_full)
    np.testing.assert_array_equal(before[1:], after[:-1])
    assert replay.session.position == sum(tokens)


def test_golden_fusions(golden: GoldenCase, replay: Replay) -> None:
    tolerance = 2e-3 if golden.saturated else 1e-4
    io = golden.io
    for e, forward in enumerate(io["event_forward"]):
        for event in replay.events[forward - 1]:
            at = f"e{e}.l{event.layer}"
            length = io[f"{at}.k_before"].shape[2]
            assert event.length.tolist() == [length] * event.key.shape[0], at
            close(event.key[:, :, :length], io[f"{at}.k_before"], tolerance, f"{at}.k_before")
            close(event.value[:, :, :length], io[f"{at}.v_before"], tolerance, f"{at}.v_before")
            close(event.scores[:, :, :length], io[f"{at}.hh_before"], tolerance, f"{at}.hh_before")
            assert not event.key[:, :, length:].any(), at
            assert not event.value[:, :, length:].any(), at

            fused = event.fused
            chosen = fused.selection
            left = length - golden.args["keep_hh_size"]
            np.testing.assert_array_equal(chosen.keep, io[f"{at}.keep_idx"], err_msg=at)
            np.testing.assert_array_equal(chosen.rest[:, :, :left], io[f"{at}.rest_idx"], err_msg=at)
            np.testing.assert_array_equal(chosen.residual, io[f"{at}.res_idx"], err_msg=at)
            close(fused.key, io[f"{at}.k_after"], tolerance, f"{at}.k_after")
            close(fused.value, io[f"{at}.v_after"], tolerance, f"{at}.v_after")
            if f"{at}.w" in io:
                n = golden.args["normalizer_per_layer"][event.layer]
                anchor = torch.nn.functional.one_hot(chosen.residual, fused.mixing.shape[-1])
                weights = (1 - n) * anchor + n * fused.mixing
                close(weights[..., :left], io[f"{at}.w"], tolerance, f"{at}.w")
                assert not weights[..., left:].any(), at
            # scores at the end of the forward that begins with the fused slots: live state columns, then new ones
            slots, mem_size = replay.session.model.cache.capacity, golden.args["mem_size"]
            scores = replay.scores[forward][event.layer]
            scores = torch.cat([scores[:, :, :mem_size], scores[:, :, slots:]], dim=2)
            close(scores, io[f"{at}.hh_end"], tolerance, f"{at}.hh_end")


def test_golden_final_state(golden: GoldenCase, replay: Replay) -> None:
    tolerance = 2e-3 if golden.saturated else 1e-4
    state, slots = replay.session.state, replay.session.model.cache.capacity
    for i in range(len(state.keys)):
        key, value = golden.io[f"final.l{i}.k"], golden.io[f"final.l{i}.v"]
        length = key.shape[2]
        if length > slots:  # fused at once here, at the next forward there
            (last,) = (e for e in replay.events[len(replay.scores) - 1] if e.layer == i)
            got_key, got_value = last.key, last.value
        else:
            got_key, got_value = state.keys[i], state.values[i]
            assert not got_key[:, :, length:].any()
        close(got_key[:, :, :length], key, tolerance, f"final.l{i}.k")
        close(got_value[:, :, :length], value, tolerance, f"final.l{i}.v")
        scores = replay.scores[-1][i]
        scores = torch.cat([scores[:, :, : length - 1], scores[:, :, slots:]], dim=2)
        close(scores, golden.io[f"final.l{i}.hh"], tolerance, f"final.l{i}.hh")


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers_while_the_text_fits(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    theirs = make_model(tmp_path, family, **changes)
    model = ReferenceModel(load_checkpoint(tmp_path, policy="h2o", mem_size=100, block_size=40))
    ids = torch.randint(0, 96, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits

    whole = ReferenceSession(model, batch=2)
    close(whole.read(ids).logits, expected.numpy(), 1e-4, "one forward")
    assert expected.abs().max() > 1  # the tolerance means something

    parts = ReferenceSession(model, batch=2)
    logits = [parts.prefill(ids[:, :70], return_all=True)]
    logits += [parts.step(ids[:, i])[:, None] for i in range(70, 90)]
    close(torch.cat(logits, dim=1), expected.numpy(), 1e-4, "blocks and steps")
    assert (parts.position, parts.live_slots) == (90, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make_model(tmp_path, "qwen2").to(dtype)
    model = ReferenceModel(load_checkpoint(tmp_path, policy="h2o", mem_size=64), dtype)
    ids = torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits.float()
    got = ReferenceSession(model).read(ids).logits
    assert got.dtype == torch.float32
    step = torch.finfo(dtype).eps * expected.abs().max()
    close(got, expected.numpy(), 8 * float(step), "logits")


def test_random_positions_match_transformers(tmp_path: Path) -> None:
    theirs = make_model(tmp_path)
    model = ReferenceModel(load_checkpoint(tmp_path, policy="h2o", mem_size=64))
    state = dataclasses.replace(model.empty_state(), position=torch.tensor([5000]))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = theirs(ids, position_ids=5000 + torch.arange(30)[None]).logits
    close(model(ids, state).logits, expected.numpy(), 2e-3, "logits")  # their float32 angles are off by 5000 * 6e-8


# --- rotary embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1 << 20, (1 << 31) - 1])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rope_tables_are_exact_at_any_position(last: int, theta: float) -> None:
    rope = {"type": "default", "theta": theta}
    rng = np.random.default_rng(0)
    positions = np.concatenate([[0, 1, 2047, 2048, 2048**2 - 1, 2048**2, last], rng.integers(0, last, 200)])
    positions = positions[positions <= last]
    tables = rope_tables(rope, 16)
    assert [c.shape for c, _ in tables] == [(2048, 8), (2048, 8), (512, 8)]
    cos, sin = combine_tables(tables, positions)
    assert cos.dtype == sin.dtype == np.float32
    for position, row_cos, row_sin in zip(positions, cos, sin, strict=True):
        for i in range(8):
            with mpmath.workdps(40):
                angle = int(position) * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / 16)
                exact_cos, exact_sin = mpmath.cos(angle), mpmath.sin(angle)
            # sin(got - exact), the error of the angle
            error = float(row_sin[i]) * exact_cos - float(row_cos[i]) * exact_sin
            assert abs(error) < 2e-6, (position, i)


def test_angles_of_the_model_stay_exact_far_out(tiny: Checkpoint) -> None:
    model = ReferenceModel(tiny)
    start = torch.tensor([0, 1 << 20, (1 << 31) - 5])
    cos, sin = model.rotary(start, 4)  # (3, 1, 4, 4)
    positions = start[:, None].numpy() + np.arange(4)
    expected_cos, expected_sin = combine_tables(rope_tables(tiny.geometry.rope, 8), positions)
    close(cos[:, 0], expected_cos, 2e-6, "cos")
    close(sin[:, 0], expected_sin, 2e-6, "sin")


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("variant", ["llama-mha", "llama-linear", "llama-llama3-wide-heads", "llama-yarn-full"])
def test_frequencies_match_transformers(variant: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = VARIANTS[variant][1].get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=256, rope_parameters=dict(parameters))
    theirs = LlamaRotaryEmbedding(config)
    rope = {"type": parameters["rope_type"], "theta": parameters["rope_theta"], **parameters}
    frequencies, scaling = inverse_frequencies(rope, head_dim)
    np.testing.assert_allclose(frequencies, theirs.inv_freq, rtol=1e-6)
    assert scaling == pytest.approx(theirs.attention_scaling)
    cos, _ = combine_tables(rope_tables(rope, head_dim), np.array([0]))
    np.testing.assert_allclose(cos[0], scaling, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"type": "dynamic", "factor": 2.0}, UnsupportedModelError, "length of the whole text.*use linear, yarn"),
        ({"type": "longrope"}, UnsupportedModelError, "length of the whole text"),
        ({"type": "spiral"}, UnsupportedModelError, "expected one of default, linear, llama3, yarn, got 'spiral'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor: expected 1"),
        ({"type": "linear"}, ConfigError, "factor: expected a number above 0, got None"),
        ({"type": "yarn", "factor": 4.0}, ConfigError, "original_max_position_embeddings"),
        ({"theta": -1.0}, ConfigError, "theta"),
    ],
)
def test_rope_refusals(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        inverse_frequencies({"type": "default", "theta": 10000.0} | changes, 8)


# --- the fusion, by hand ----------------------------------------------------------------------------------------------


def column(*values: float) -> torch.Tensor:
    """(1, 1, S) float32."""
    return torch.tensor([[list(values)]])


def test_selection_by_hand() -> None:
    cache = LococoConfig(mem_size=4, keep=2, block_size=4, local_len=1, buffer=0, kernel_size=1)
    #               0    1    2    3    4    5    dead
    scores = column(0.1, 0.9, 0.3, 0.3, 0.2, 0.0, 9.9)
    chosen = select(scores, torch.tensor([6]), cache)
    assert chosen.keep.tolist() == [[[1, 5]]]  # the heaviest of the first five, and the last
    assert chosen.rest[0, 0, :4].tolist() == [0, 2, 3, 4]
    assert chosen.rest_length.tolist() == [4]
    assert chosen.residual.tolist() == [[[1, 2]]]  # columns 2 and 3: indices into the rest


def test_equal_scores_go_to_the_first_columns() -> None:
    cache = LococoConfig(mem_size=4, keep=2, block_size=4, buffer=0, kernel_size=1)
    scores = column(*[0.0, 1.0] * 500)  # unstable sorts keep order in short rows
    chosen = select(scores, torch.tensor([1000]), cache)
    assert chosen.keep.tolist() == [[[1, 3]]]
    assert chosen.residual.tolist() == [[[3, 5]]]  # columns 5 and 7; the rest is 0, 2, 4, 5, 6, 7, ...


def test_fusion_by_hand() -> None:
    cache = LococoConfig(mem_size=2, keep=1, block_size=4, buffer=0, kernel_size=1, activation="relu", score_decay=0.5)
    key = torch.tensor([[[[0.0], [2.0], [1.0], [0.0]]]])  # (1, 1, 4, 1); the last column is dead
    value = torch.tensor([[[[1.0], [5.0], [3.0], [0.0]]]])
    # the convolution passes the key on, so the mixing logits of the rest, columns 0 and 2, are relu(0), relu(1)
    head = HeadWeights(0.5, ((torch.tensor([[[1.0], [0.0]]]), torch.zeros(1)),))
    fused = fuse_slots(key, value, column(0.3, 0.9, 0.2, 0.0), torch.tensor([3]), cache, head)
    share = np.e / (1 + np.e)  # softmax(0, 1)[1]
    assert fused.selection.keep.tolist() == [[[1]]]
    assert fused.selection.residual.tolist() == [[[0]]]
    np.testing.assert_allclose(fused.mixing[0, 0, 0], [1 - share, share, 0], rtol=1e-6)
    np.testing.assert_allclose(fused.key[0, 0, :, 0], [2, 0.5 * 0 + 0.5 * share], rtol=1e-6)
    np.testing.assert_allclose(fused.value[0, 0, :, 0], [5, 0.5 * 1 + 0.5 * (1 + 2 * share)], rtol=1e-6)
    np.testing.assert_allclose(fused.scores[0, 0], [0.9, 0.5 * 0.3 + 0.5 * (0.3 - 0.1 * share)], rtol=1e-6)


def naive_fusion(
    key: np.ndarray, value: np.ndarray, scores: np.ndarray, cache: LococoConfig, head: HeadWeights
) -> tuple[np.ndarray, np.ndarray]:
    """One head, (L, d) and (L,) float64, with plain loops."""
    length = len(key)
    heavy = sorted(range(length - cache.local_len), key=lambda j: -scores[j])[: cache.keep - cache.local_len]
    keep = sorted(heavy) + list(range(length - cache.local_len, length))
    rest = [j for j in range(length) if j not in keep]
    anchors = sorted(sorted(range(len(rest)), key=lambda j: -scores[rest[j]])[: cache.num_mixed])
    x = np.concatenate([key[rest], value[rest]], axis=1).T  # (2d, N)
    for weight, bias in ((w.double().numpy(), b.double().numpy()) for w, b in head.convs):
        half = weight.shape[2] // 2
        x = np.pad(x, ((0, 0), (half, half)))
        columns = range(x.shape[1] - 2 * half)
        x = np.stack([(weight * x[:, j : j + 2 * half + 1]).sum((1, 2)) + bias for j in columns], axis=1)
        x = {"relu": np.maximum(x, 0), "tanh": np.tanh(x), "silu": x / (1 + np.exp(-x)), "none": x}[cache.activation]
    shares = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    weights = (1 - head.normalizer) * np.eye(len(rest))[anchors] + head.normalizer * shares
    return tuple(np.concatenate([y[keep], weights @ y[rest]]) for y in (key, value))


@pytest.mark.parametrize("length", [13, 20, 28])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_len": 0},
        {"local_len": 7, "activation": "none"},
        {"keep": 0, "local_len": 0, "activation": "tanh"},
        {"keep": 11, "num_conv_layers": 2, "conv_expand": 3, "activation": "silu", "kernel_size": 9},
        {"num_conv_layers": 3, "kernel_size": 1},
    ],
)
def test_fusion_against_plain_loops(changes: dict[str, Any], length: int) -> None:
    cache = small_cache(**changes)
    (head, *_) = random_heads(GEOMETRY, cache)
    generator = torch.Generator().manual_seed(length)
    key, value = torch.randn(2, 2, 3, 28, 8, generator=generator, dtype=torch.float64)  # (B, K, S, d)
    scores = torch.rand(2, 3, 28, generator=generator)
    key[:, :, length:], value[:, :, length:] = 0, 0
    wide = HeadWeights(head.normalizer, tuple((w.double(), b.double()) for w, b in head.convs))
    fused = fuse_slots(key, value, scores, torch.full((2,), length), cache, wide)
    for b in range(2):
        for k in range(3):
            arrays = (x[b, k, :length].double().numpy() for x in (key, value, scores))
            expected_key, expected_value = naive_fusion(*arrays, cache, head)
            close(fused.key[b, k], expected_key, 1e-9, "key")
            close(fused.value[b, k], expected_value, 1e-9, "value")


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "tanh"])
def test_dead_columns_equal_the_padding_of_the_convolution(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    head = HeadWeights(
        0.5,
        (
            (torch.randn(6, 8, 5, generator=generator), torch.randn(6, generator=generator)),
            (torch.randn(3, 6, 5, generator=generator), torch.randn(3, generator=generator)),
        ),
    )
    key, value = torch.randn(2, 1, 2, 9, 4, generator=generator)
    exact = mixing_logits(key, value, torch.tensor([9]), head, activation)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 4)) for x in (key, value)]
    wide = mixing_logits(padded[0], padded[1], torch.tensor([9]), head, activation)
    torch.testing.assert_close(wide[..., :9], exact)


def test_h2o_by_hand() -> None:
    cache = LococoConfig.h2o(mem_size=4, block_size=2, buffer=0)
    key = torch.arange(6.0).reshape(1, 1, 6, 1)
    fused = fuse_slots(key, 10 * key, column(0.5, 0.1, 0.7, 0.6, 0.8, 0.9), torch.tensor([6]), cache, None)
    assert fused.key.flatten().tolist() == [2, 3, 4, 5]  # two heavy hitters of the first four, and the last two
    assert fused.value.flatten().tolist() == [20, 30, 40, 50]
    np.testing.assert_allclose(fused.scores.flatten(), [0.7, 0.6, 0.8, 0.9])


def test_join_columns_of_rows_that_differ() -> None:
    past, new = torch.tensor([[[1, 2, 0]], [[5, 0, 0]]]), torch.tensor([[[3, 99]], [[6, 7]]])
    joined = join_columns(past, new, torch.tensor([2, 1]), torch.tensor([1, 2]))
    assert joined.tolist() == [[[1, 2, 3, 0, 0]], [[5, 6, 7, 0, 0]]]


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A grouped-query model with random heads in a cache that fuses often."""
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    plain = load_checkpoint(path, policy="h2o", mem_size=12)
    cache = small_cache(num_conv_layers=2, conv_expand=2, activation="gelu")
    return dataclasses.replace(plain, config=cache, heads=random_heads(plain.geometry, cache))


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def test_accumulated_scores_are_the_column_sums_of_attention(tmp_path: Path) -> None:
    theirs = make_model(tmp_path)
    ids = random_ids(1, 20)
    with torch.no_grad():
        attention = theirs(ids, output_attentions=True).attentions  # per layer (1, H, 20, 20)
    session = ReferenceSession(ReferenceModel(load_checkpoint(tmp_path, policy="h2o", mem_size=32)))
    session.prefill(ids[:, :13])
    for i in range(13, 20):
        session.step(int(ids[0, i]))
    for scores, received in zip(session.state.scores, attention, strict=True):
        expected = received.sum(dim=2).view(1, 2, 2, 20).sum(dim=2)  # over queries, then over the heads of a group
        close(scores[:, :, :20], expected.numpy(), 1e-4, "scores")
        assert not scores[:, :, 20:].any()


def test_h2o_drops_a_column_per_step_once_full(tmp_path: Path) -> None:
    make_model(tmp_path)
    model = ReferenceModel(load_checkpoint(tmp_path, policy="h2o", mem_size=8, block_size=4, buffer=0))
    events: list[FusionEvent] = []
    session = ReferenceSession(model, on_fusion=events.append)
    session.prefill(random_ids(8).tolist())
    assert (session.live_slots, len(events)) == (8, 0)
    for n, token in enumerate(random_ids(5).tolist(), 1):
        session.step(token)
        assert (session.live_slots, session.position, len(events)) == (8, 8 + n, 2 * n)
        for event in events[-2:]:
            assert event.fused.selection.keep[..., -4:].tolist() == [[[5, 6, 7, 8]] * 2]
            kept = event.fused.selection.keep
            torch.testing.assert_close(session.state.scores[event.layer], event.scores.gather(2, kept))


def test_rows_of_a_batch_are_independent(tiny: Checkpoint) -> None:
    model = ReferenceModel(tiny)
    ids = random_ids(3, 50)
    together = ReferenceSession(model, batch=3)
    logits = together.prefill(ids, return_all=True)
    for row in range(3):
        alone = ReferenceSession(model)
        close(alone.prefill(ids[row], return_all=True)[0], logits[row].numpy(), 1e-5, f"row {row}")


def test_padded_forwards_equal_exact_ones(tiny: Checkpoint) -> None:
    """Right padding, rows of different length, and rows that fuse at different times change nothing."""
    model = ReferenceModel(tiny)
    ids = random_ids(2, 60)
    sizes = [(8, 3), (8, 8), (1, 7), (8, 2), (5, 5), (8, 8), (2, 1), (8, 8)]
    state = model.empty_state(2)
    exact = [ReferenceSession(model), ReferenceSession(model)]
    start = [0, 0]
    for both in sizes:
        block = torch.zeros(2, 8, dtype=torch.int64)
        for row, n in enumerate(both):
            block[row, :n] = ids[row, start[row] : start[row] + n]
            exact[row].read(block[row : row + 1, :n])
            start[row] += n
        num_tokens = torch.tensor(both)
        result = model(block, state, num_tokens, return_all=False)
        state = model.update(state, result, num_tokens)
        for row, session in enumerate(exact):
            assert (state.length[row], state.position[row]) == (session.live_slots, session.position)
            close(state.logits[row], session.state.logits[0].numpy(), 1e-5, f"logits of row {row}")
            for mine, theirs in zip(state.keys + state.values, session.state.keys + session.state.values, strict=True):
                close(mine[row], theirs[0].numpy(), 1e-5, f"state of row {row}")


def test_a_forward_leaves_its_state_alone_and_repeats(tiny: Checkpoint) -> None:
    session = ReferenceSession(ReferenceModel(tiny))
    session.prefill(random_ids(45))
    state = session.state
    tensors = [*state.keys, *state.values, state.length, state.logits]
    copies = [t.clone() for t in tensors]
    first = session.prefill(random_ids(30, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))
    session.state = state
    assert torch.equal(session.prefill(random_ids(30, seed=2)), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(tiny: Checkpoint, dtype: torch.dtype) -> None:
    ids = random_ids(14)
    exact, half = ReferenceSession(ReferenceModel(tiny)), ReferenceSession(ReferenceModel(tiny, dtype))
    expected = exact.prefill(ids)
    close(half.prefill(ids), expected.numpy(), 0.1, "logits")
    half.prefill(random_ids(80))
    assert half.state.keys[0].dtype == dtype
    assert half.state.logits.isfinite().all()


def test_a_forward_compiles_without_graph_breaks(tiny: Checkpoint) -> None:
    model = ReferenceModel(tiny)
    session = ReferenceSession(model)
    session.prefill(random_ids(40))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    ids = torch.tensor([[7]])
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, session.state).logits, model(ids, session.state).logits)


@pytest.mark.parametrize("ids", [[], [[1, 2], [3, 4]], [0.5]])
def test_ids_of_a_wrong_shape_are_refused(tiny: Checkpoint, ids: list[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected \(1, 1 or more\) integers"):
        ReferenceSession(ReferenceModel(tiny)).prefill(ids)


@pytest.mark.parametrize("token", [-1, 96])
def test_ids_out_of_range_are_refused(tiny: Checkpoint, token: int) -> None:
    session = ReferenceSession(ReferenceModel(tiny))
    with pytest.raises(InvalidArgumentError, match=f"expected tokens of 0 to 95, got {token}"):
        session.step(token)
    assert session.position == 0
