"""Sampling against transformers' own processors; penalties across stepping, saving and cloning; stop strings."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bundles import export_tiny
from conftest import Backend
from lococo_runtime import (
    InvalidArgumentError,
    Model,
    SamplingParams,
    Session,
    StopMatcher,
    TokenIdError,
    TokenLogprobs,
)
from lococo_runtime.bundle import LococoConfig
from transformers.generation import logits_process as hf

HEADER, LOGITS = 88, 88 + 16  # bytes of a state before its payload and before its logits
PROMPT, GENERATED = [5, 6, 7, 5, 3], [9, 4, 9, 8, 9]

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=[12, 96, 49_152])
def sized_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("sized") / "bundle", LococoConfig.h2o(16, 16), vocab_size=request.param)


@pytest.fixture(scope="module")
def model(backend: Backend) -> Iterator[Model]:
    with Model(backend.bundle("sampling"), **backend.options) as opened:
        yield opened


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with model.session() as s:
        yield s


def read_prompt_and_generate(session: Session) -> None:
    session.prefill(PROMPT)
    for token in GENERATED:
        session.step(token)


def set_logits(session: Session, logits: Floats) -> None:
    """Any logits, by a state that holds them."""
    state = bytearray(session.state())
    state[LOGITS : LOGITS + logits.nbytes] = logits.astype("<f4").tobytes()
    state[56:HEADER] = hashlib.sha256(state[:56] + state[HEADER:]).digest()
    session.set_state(bytes(state))


def expected(
    logits: Floats, p: SamplingParams, allowed: npt.NDArray[np.bool_] | None = None, dtype: torch.dtype = torch.float64
) -> npt.NDArray[np.float64]:
    """The distribution by transformers' processors, in the order of its `_get_logits_processor`.

    In float64: the sums of a float32 softmax over 49,152 tokens are off by more than the tolerance. The two penalties
    that transformers lacks follow the formula of OpenAI's API reference.
    """
    ids = torch.tensor([PROMPT + GENERATED])
    scores = torch.tensor(logits)[None].to(dtype)
    if p.logit_bias:
        bias = {(token,): float(value) for token, value in p.logit_bias.items()}
        scores = hf.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if p.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(GENERATED), minlength=len(logits))
    scores = scores - counts * p.frequency_penalty - (counts > 0) * p.presence_penalty
    if allowed is not None:
        scores = scores.masked_fill(~torch.tensor(allowed), -torch.inf)
    for processor, wanted in (
        (hf.TemperatureLogitsWarper, p.temperature if p.temperature != 1 else None),
        (hf.TopKLogitsWarper, p.top_k or None),
        (hf.TopPLogitsWarper, p.top_p if p.top_p < 1 else None),
        (hf.MinPLogitsWarper, p.min_p or None),
        (hf.TypicalLogitsWarper, p.typical_p if p.typical_p < 1 else None),
    ):
        if wanted is not None:
            scores = processor(wanted)(ids, scores)
    return np.asarray(scores.double().softmax(-1)[0].numpy())


GRID: dict[str, list[Any]] = {
    "temperature": [0.1, 0.5, 1.0, 1.7, 4.0],
    "top_k": [0, 0, 1, 5, 50, 5000],
    "top_p": [1.0, 1.0, 0.05, 0.5, 0.9, 0.99],
    "min_p": [0.0, 0.0, 0.01, 0.2, 1.0],
    "typical_p": [1.0, 1.0, 0.2, 0.9, 0.99],
    "repetition_penalty": [1.0, 0.6, 1.3],
    "presence_penalty": [0.0, -1.0, 0.7],
    "frequency_penalty": [0.0, -0.4, 1.1],
}


def random_params(random: np.random.Generator, vocab_size: int) -> SamplingParams:
    chosen = {name: values[random.integers(len(values))] for name, values in GRID.items()}
    biased = random.choice(vocab_size, min(8, vocab_size), replace=False)
    bias = {int(i): float(np.float32(random.normal(0, 4))) for i in biased} if random.random() < 0.5 else {}
    return SamplingParams(**chosen, logit_bias=bias)


def pack(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    bits = np.packbits(allowed, bitorder="little")
    return np.frombuffer(bits.tobytes() + bytes(-len(bits) % 4), "<u4")


def test_distributions_equal_those_of_transformers(sized_bundle: Path) -> None:
    random = np.random.default_rng(0)
    with Session(sized_bundle) as session:
        read_prompt_and_generate(session)
        vocab_size = session.model.vocab_size
        for _ in range(40 if vocab_size > 1000 else 400):
            logits = (random.standard_normal(vocab_size) * random.choice([0.3, 2, 8])).astype(np.float32)
            set_logits(session, logits)
            params = random_params(random, vocab_size)
            allowed = random.random(vocab_size) < 0.7 if random.random() < 0.3 else None
            mask = None if allowed is None else pack(allowed)
            got = session.distribution(params, mask)
            np.testing.assert_allclose(got, expected(logits, params, allowed), rtol=0, atol=1e-6, err_msg=str(params))
            assert got[session.sample(params, mask)] > 0


def test_ties_and_boundaries_are_those_of_transformers(sized_bundle: Path) -> None:
    """Whole numbers tie all the time. Up to 16 tokens torch's sort keeps the order of ties: then ids are equal too."""
    random = np.random.default_rng(1)
    with Session(sized_bundle) as session:
        read_prompt_and_generate(session)
        vocab_size = session.model.vocab_size
        for _ in range(20 if vocab_size > 1000 else 300):
            logits = random.integers(-3, 4, vocab_size).astype(np.float32)
            set_logits(session, logits)
            top_k, top_p, min_p = random.integers(1, 8), random.choice([0.13, 0.47, 0.81, 1.0]), random.choice([0, 0.3])
            params = SamplingParams(temperature=0.9, top_k=int(top_k), top_p=float(top_p), min_p=float(min_p))
            got, want = session.distribution(params), expected(logits, params)
            if vocab_size > 16:
                got, want = np.sort(got), np.sort(want)  # type: ignore[assignment]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=f"{params} {logits}")


def test_top_k_keeps_all_that_tie_with_the_last(session: Session) -> None:
    logits = np.zeros(96, np.float32)
    logits[[3, 5, 7]] = 2
    logits[9] = 3
    session.prefill(PROMPT)
    set_logits(session, logits)
    probabilities = session.distribution(SamplingParams(temperature=1.0, top_k=2))
    assert np.flatnonzero(probabilities).tolist() == [3, 5, 7, 9]


@pytest.mark.parametrize(
    "halvings", [(1, 2, 3, 3), (2, 2, 2, 2), (1, 3, 3, 3, 4, 4), (3,) * 8, (0, 0, 2, 2, 2, 2)], ids=str
)
def test_sums_that_meet_the_edge_exactly(session: Session, halvings: tuple[int, ...]) -> None:
    """Probabilities are powers of two, so that sums are exact; in float32, as a model that samples computes."""
    logits = np.full(96, -1e4, np.float32)
    logits[10 : 10 + len(halvings)] = -np.log(2) * np.array(halvings)
    read_prompt_and_generate(session)
    set_logits(session, logits)
    for share in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875):
        for params in (
            SamplingParams(temperature=1.0, top_p=share),
            SamplingParams(temperature=1.0, typical_p=share),
            SamplingParams(temperature=1.0, min_p=share),
        ):
            got, want = session.distribution(params), expected(logits, params, dtype=torch.float32)
            assert np.count_nonzero(got) == np.count_nonzero(want), params
            np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [5e-324, 1e-40, 1e-9])
def test_the_least_share_keeps_one(session: Session, share: float) -> None:
    """Also one that is 0 in float32."""
    read_prompt_and_generate(session)
    for params in (SamplingParams(temperature=1.0, top_p=share), SamplingParams(temperature=1.0, typical_p=share)):
        assert np.count_nonzero(session.distribution(params)) == 1


def test_greedy_takes_the_largest_after_penalties_bias_and_mask(session: Session) -> None:
    logits = np.zeros(96, np.float32)
    logits[[9, 20, 21, 22]] = 5, 4.9, 4.9, 4.8
    session.prefill(PROMPT)
    session.step(9)
    set_logits(session, logits)
    allow_22 = pack(np.arange(96) >= 22)
    cases: list[tuple[SamplingParams, npt.NDArray[np.uint32] | None, int]] = [
        (SamplingParams(), None, 9),
        (SamplingParams(repetition_penalty=1.1), None, 20),
        (SamplingParams(presence_penalty=0.2), None, 20),
        (SamplingParams(frequency_penalty=0.2), None, 20),
        (SamplingParams(logit_bias={9: -1, 20: -1}), None, 21),
        (SamplingParams(), allow_22, 22),
    ]
    for params, mask, token in cases:
        assert session.sample(params, mask) == token
        assert np.flatnonzero(session.distribution(params, mask)).tolist() == [token]


@pytest.mark.parametrize("temperature", [1e-45, 1e-320, 1e-30])
def test_next_to_no_temperature_is_greedy(session: Session, temperature: float) -> None:
    logits = session.prefill(PROMPT)
    assert session.sample(SamplingParams(temperature=temperature)) == int(logits.argmax())


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.3},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2},
        {"temperature": 2.0, "min_p": 0.05, "typical_p": 0.9, "presence_penalty": 0.5, "logit_bias": {40: 2.0}},
    ],
    ids=str,
)
def test_10_000_draws_follow_the_distribution(session: Session, params: dict[str, Any]) -> None:
    read_prompt_and_generate(session)
    p = expected(session.logits(), SamplingParams(**params))
    draws = 10_000
    drawn = [session.sample(SamplingParams(**params, seed=seed)) for seed in range(draws)]
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    rare = p * draws < 5  # taken together
    got = np.append(counts[~rare], counts[rare].sum())
    want = np.append(p[~rare], p[rare].sum()) * draws
    got, want = got[want > 0], want[want > 0]
    freedom = len(want) - 1
    assert freedom > 5
    assert ((got - want) ** 2 / want).sum() < freedom + 4 * np.sqrt(2 * freedom)


EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=60,
    top_p=0.97,
    min_p=0.001,
    typical_p=0.98,
    repetition_penalty=1.2,
    presence_penalty=0.6,
    frequency_penalty=0.3,
    logit_bias={11: 1.5, 12: -1.5},
    seed=7,
    max_tokens=30,
    ignore_eos=True,
)


def changed(params: SamplingParams, **changes: Any) -> SamplingParams:
    return SamplingParams(**{**params.__dict__, **changes})


def by_generate(session: Session, params: SamplingParams) -> list[int]:
    return list(session.generate(PROMPT, params))


def by_generate_all(session: Session, params: SamplingParams) -> list[int]:
    return session.generate_all(PROMPT, params)


def by_steps(session: Session, params: SamplingParams) -> list[int]:
    session.prefill(PROMPT)
    tokens = [session.sample(params)]
    while len(tokens) < params.max_tokens:
        session.step(tokens[-1])
        tokens.append(session.sample(params))
    return tokens


def by_resuming(session: Session, params: SamplingParams) -> list[int]:
    """In calls of 1, 2, 3, ... tokens, each in a session that was loaded or cloned from the one before."""
    session.prefill(PROMPT)
    tokens: list[int] = []
    sessions = [session]
    while len(tokens) < params.max_tokens:
        n = min(len(sessions), params.max_tokens - len(tokens))
        last = tokens[-1:]
        tokens += sessions[-1].generate_all(last, changed(params, max_tokens=n))
        if len(sessions) % 2:
            sessions.append(Session(session.model))
            sessions[-1].set_state(sessions[-2].state())
        else:
            sessions.append(sessions[-1].clone())
    for s in sessions[1:]:
        s.close()
    return tokens


@pytest.mark.parametrize("run", [by_generate, by_generate_all, by_steps, by_resuming])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_tokens_however_generation_runs(
    session: Session, run: Callable[[Session, SamplingParams], list[int]], temperature: float
) -> None:
    params = changed(EVERYTHING, temperature=temperature)
    tokens = by_generate(session, params)
    assert len(tokens) == params.max_tokens
    state = session.state()
    session.reset()
    assert run(session, params) == tokens
    if run is not by_resuming:  # which read the last tokens in other sessions
        assert session.state() == state
    session.reset()
    plain = changed(params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    assert run(session, plain) != tokens


def test_a_seed_gives_the_same_tokens_in_every_process(session: Session) -> None:
    """A golden draw: the uniform numbers of splitmix64 are fixed, not only repeatable."""
    session.prefill(PROMPT)
    set_logits(session, np.zeros(96, np.float32))
    drawn = [session.sample(SamplingParams(temperature=1.0, seed=seed)) for seed in range(8)]
    assert drawn == [uniform_draw(seed, len(PROMPT), 96) for seed in range(8)]


def uniform_draw(seed: int, position: int, n: int) -> int:
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    bits = mix((mix((seed + golden) % 2**64) + (position + 1) * golden) % 2**64)
    return int((bits >> 11) / 2**53 * n)


# --- what penalties see ----------------------------------------------------------------------------------------------


def seen(session: Session, params: SamplingParams) -> dict[int, float]:
    """Logits that `params` change, by how much: penalties over equal logits of 1."""
    logits = np.ones(session.model.vocab_size, np.float32)
    set_logits(session, logits)
    p = session.distribution(changed(params, temperature=1.0)).astype(np.float64)
    change = np.log(p / np.median(p))
    return {int(i): round(float(change[i]), 4) for i in np.flatnonzero(np.abs(change) > 1e-4)}


def test_penalties_see_the_prompt_or_what_was_generated(session: Session) -> None:
    repetition, frequency = SamplingParams(repetition_penalty=2.0), SamplingParams(frequency_penalty=0.25)
    presence = SamplingParams(presence_penalty=0.25)
    session.prefill([5, 6])
    assert (seen(session, repetition), seen(session, frequency)) == ({5: -0.5, 6: -0.5}, {})
    session.step(7)
    session.prefill([7])  # one token: generation goes on
    session.step(5)
    assert seen(session, repetition) == {5: -0.5, 6: -0.5, 7: -0.5}
    assert seen(session, frequency) == {5: -0.25, 7: -0.5}
    assert seen(session, presence) == {5: -0.25, 7: -0.25}
    session.prefill([8, 9])  # the next prompt
    assert set(seen(session, repetition)) == {5, 6, 7, 8, 9}
    assert seen(session, frequency) == {}
    session.reset()
    session.prefill([3])
    assert (seen(session, repetition), seen(session, frequency)) == ({3: -0.5}, {})


def test_counts_are_in_the_state_and_checked(session: Session) -> None:
    read_prompt_and_generate(session)
    state = session.state()
    counts = np.frombuffer(state, "<i4")[-96:]
    want = np.zeros(96, int)
    want[PROMPT] = 1
    want += np.bincount(GENERATED, minlength=96) + np.isin(np.arange(96), GENERATED)
    assert counts.tolist() == want.tolist()
    broken = bytearray(state[:-4] + b"\xff\xff\xff\xff")
    broken[56:HEADER] = hashlib.sha256(broken[:56] + broken[HEADER:]).digest()
    with pytest.raises(Exception, match="token_counts"):
        session.set_state(bytes(broken))
    assert session.state() == state


# --- logprobs --------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own(sized_bundle: Path) -> None:
    with Session(sized_bundle) as session:
        read_prompt_and_generate(session)
        vocab_size = session.model.vocab_size
        want = torch.tensor(session.logits()).double().log_softmax(-1).numpy()
        for top in (0, 1, 5, vocab_size):
            got = session.logprobs(7, top)
            assert got.token_id == 7
            assert got.logprob == pytest.approx(want[7], abs=1e-5)
            ids = np.lexsort((np.arange(vocab_size), -session.logits()))[:top]
            assert list(got.top) == ids.tolist()
            np.testing.assert_allclose(list(got.top.values()), want[ids], rtol=0, atol=1e-5)
        with pytest.raises(TokenIdError):
            session.logprobs(vocab_size)
        with pytest.raises(InvalidArgumentError, match="logprobs"):
            session.logprobs(0, vocab_size + 1)


@pytest.mark.parametrize("call", [Session.generate, Session.generate_all])
def test_logprobs_of_generated_tokens(session: Session, call: Callable[..., Any]) -> None:
    entries: list[TokenLogprobs] = []
    tokens = list(call(session, PROMPT, changed(EVERYTHING, logprobs=3), logprobs=entries))
    session.reset()
    assert tokens == by_generate(session, EVERYTHING)
    session.reset()
    logits = session.prefill(PROMPT)
    for token, entry in zip(tokens, entries, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(torch.tensor(logits).log_softmax(-1)[token]), abs=1e-5)
        assert list(entry.top) == np.argsort(-logits, kind="stable")[:3].tolist()
        logits = session.step(token)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_masks_as_grammar_libraries_make_them(session: Session) -> None:
    session.prefill(PROMPT)
    allowed = np.zeros(96, bool)
    allowed[[0, 31, 32, 95]] = True
    for mask in (pack(allowed), pack(allowed).view(np.int32), np.repeat(pack(allowed), 2)[::2]):
        for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=50)):
            drawn = {session.sample(changed(params, seed=seed), mask) for seed in range(50)}
            assert drawn <= {0, 31, 32, 95}
            assert (len(drawn) == 1) == (params.temperature == 0)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(3, np.uint32),
        np.ones(2, np.uint32),
        np.ones(4, np.uint32),
        np.ones(96, bool),
        np.ones((1, 3), np.int32),
    ],
    ids=["nothing allowed", "too short", "too long", "not packed", "two dimensions"],
)
def test_masks_that_do_not_fit(session: Session, mask: Any) -> None:
    session.prefill(PROMPT)
    before = session.state()
    for params in (SamplingParams(), SamplingParams(temperature=1.0)):
        with pytest.raises(InvalidArgumentError, match="allowed"):
            session.sample(params, mask)
    assert session.state() == before


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [Session.generate, Session.generate_all])
def test_where_generation_ends(session: Session, call: Callable[..., Any]) -> None:
    def run(**changes: Any) -> list[int]:
        session.reset()
        return list(call(session, PROMPT, changed(hot, **changes)))

    hot = SamplingParams(temperature=20.0, max_tokens=400, ignore_eos=True)
    whole = run()
    assert len(whole) == 400
    eos = whole.index(2)  # the tiny model's end of sequence
    assert run(ignore_eos=False) == whole[: eos + 1]
    for stops in ([50], [50, 60], [2]):
        end = min(whole.index(token) for token in stops)
        assert run(stop_token_ids=stops) == whole[: end + 1]
    assert run(max_tokens=0) == []
    assert run(max_tokens=1) == whole[:1]


@pytest.mark.parametrize("call", [Session.generate, Session.generate_all])
@pytest.mark.parametrize(
    "bad",
    [
        {"logit_bias": {96: 1.0}},
        {"stop_token_ids": [96]},
        {"max_tokens": 2**31 - 1},
        {"stop": "text"},
        {"logprobs": 3},
        {"temperature": 1.0, "logit_bias": {5: 3.4e38, 6: 3.4e38}, "frequency_penalty": -3.4e38},
    ],
    ids=str,
)
def test_parameters_a_session_refuses(session: Session, call: Callable[..., Any], bad: dict[str, Any]) -> None:
    session.prefill(PROMPT)
    session.step(5)
    before = session.state()
    with pytest.raises(InvalidArgumentError, match=list(bad)[-1].replace("frequency_penalty", "float32")):
        list(call(session, [] if "temperature" in bad else [5, 6], SamplingParams(**bad)))
    assert session.state() == before


@pytest.mark.parametrize(
    "bad",
    [
        *({name: value} for name in ("temperature", "top_p", "min_p", "typical_p") for value in (-0.1, "1", True)),
        *({name: 1.1} for name in ("top_p", "min_p", "typical_p")),
        *({name: value} for name in ("stop", "stop_token_ids", "logit_bias") for value in (None, 5)),
        {"logit_bias": [5]},
        {"temperature": 10**400},
        {"ignore_eos": "no"},
        *(
            {name: value}
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "typical_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            for value in (float("nan"), float("inf"), float("-inf"), 1e39)
        ),
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"top_p": 0.0},
        {"max_tokens": -1},
        {"max_tokens": 2**31},
        {"max_tokens": 1.5},
        {"top_k": -1},
        {"top_k": 2**31},
        {"seed": 2**64},
        {"logprobs": -1},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {"5": 0.0}},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("-inf")}},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["5"]},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["a", 5]},
        {"stop": ["a\0b"]},
        {"stop": ["a"] * 65},
        {"stop": ["a" * 1025]},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        SamplingParams(**bad)


# --- stop strings ----------------------------------------------------------------------------------------------------


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, of those that end together the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def undecided(text: str, stop: list[str]) -> int:
    """Characters at the end of `text` that may begin a stop string."""
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


def test_stop_strings_however_the_text_is_cut() -> None:
    rng = random.Random(0)
    matched = 0
    for trial in range(3000):
        letters = "ab" if trial % 2 else "aé😀"
        stop = ["".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4))]
        text = "".join(rng.choices(letters + "c", k=rng.randint(0, 30)))
        want, reason = cut(text, stop)
        matcher = StopMatcher(stop)
        shown, taken = "", 0
        while taken < len(text) and matcher.matched is None:
            piece = text[taken : taken + rng.randint(0, 4)]
            shown += matcher.push(piece)
            taken += len(piece)
            if matcher.matched is None:  # all that is decided comes out, and nothing else
                assert shown == text[: taken - undecided(text[:taken], stop)]
        assert (matcher.matched, shown) == (reason, want[: len(shown)])
        shown += matcher.finish() if reason is None else ""
        assert shown == want
        matched += reason is not None
    assert 500 < matched < 2500


def test_stop_strings_one_text_after_another() -> None:
    matcher = StopMatcher(["</s>"])
    assert matcher.push("a</") == "a"
    assert matcher.finish() == "</"
    assert matcher.push("s>b</s") == "s>b"
    assert matcher.push("> and more") == ""
    assert matcher.matched == "</s>"
    with pytest.raises(InvalidArgumentError, match="ended"):
        matcher.push("c")
    assert matcher.finish() == ""
    assert (matcher.matched, matcher.push("c")) == (None, "c")


@pytest.mark.parametrize("stop", [[""], ["a"] * 65, ["é" * 513], [5]], ids=["empty", "many", "long", "kind"])
def test_stop_lists_that_are_refused(stop: list[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="stop"):
        StopMatcher(stop)


def test_longest_stop_list() -> None:
    stop = [chr(0x100 + i) + "x" * 1022 for i in range(64)]
    matcher = StopMatcher(stop)
    text = "y" + stop[63]
    assert "".join(matcher.push(character) for character in text) == "y"
    assert matcher.matched == stop[63]
