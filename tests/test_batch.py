"""Sessions stepped together: the same numbers as alone, joined and left at any step, and every refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import BATCH, BATCHED, VOCAB, export_tiny
from conftest import Backend
from lococo_runtime import (
    BackendError,
    Batch,
    BusyError,
    CancelledError,
    ClosedError,
    EmptyPromptError,
    InvalidArgumentError,
    Model,
    SamplingParams,
    Session,
    SessionPool,
    TokenIdError,
    TokenLogprobs,
    UnsupportedError,
    generate_many,
)
from lococo_runtime.bundle import MANIFEST_NAME, file_entry, read_manifest
from onnx import TensorProto, helper
from tiny_models import make_model, small_cache

from lococo_export import export_bundle, load_checkpoint

SIZE = BATCH


@pytest.fixture(scope="module", params=BATCHED)
def any_model(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Model]:
    with Model(backend.bundle(f"batch-{request.param}"), **backend.options) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_bundle(cpu: Backend) -> Path:
    return cpu.bundle("batch-lococo-gqa")


@pytest.fixture(scope="module")
def model(backend: Backend) -> Iterator[Model]:
    with Model(backend.bundle("batch-lococo-gqa"), **backend.options) as opened:
        yield opened


@pytest.fixture
def batch(model: Model) -> Iterator[Batch]:
    with Batch(model) as b:
        yield b


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, n).tolist()


def read(model: Model, n: int, seed: int = 0) -> Session:
    """A session that has read n tokens, most of them in blocks."""
    session = model.session()
    session.prefill(text(n, seed))
    return session


# --- the same as alone -----------------------------------------------------------------------------------------------


def test_same_tokens_as_alone_joined_and_left_at_any_step(any_model: Model, backend: Backend) -> None:
    """Seven sessions with twins that run alone; at every step some are in the batch of three, some of these step."""
    rng = np.random.default_rng(0)
    with Batch(any_model) as batch:
        assert batch.size == any_model.max_batch == SIZE
        assert batch.implementation == ("loop" if backend.name == "tensorrt" else "graph")
        together = [read(any_model, n, seed=n) for n in (1, 2, 7, 8, 13, 30, 61)]
        alone = [session.clone() for session in together]
        params = [
            SamplingParams(temperature=0.0 if i % 2 else 1.0, top_k=20, seed=i, frequency_penalty=0.1 * i)
            for i in range(len(together))
        ]
        before = [session.counters for session in together]
        shared = 0
        for _ in range(250):
            for session in together:  # each joins or leaves now and then
                if rng.random() < 0.2:
                    if session in batch.sessions:
                        batch.remove(session)
                    elif len(batch.sessions) < SIZE:
                        batch.add(session)
            stepping = [s for s in batch.sessions if rng.random() < 0.8]
            if not stepping:
                continue
            numbers = [together.index(s) for s in stepping]
            tokens = [s.sample(params[i]) for s, i in zip(stepping, numbers, strict=True)]
            assert tokens == [alone[i].sample(params[i]) for i in numbers]
            resting = [(s, s.logits()) for s in together if s not in stepping]
            logits = batch.step(stepping, tokens)
            for row, i, token in zip(logits, numbers, tokens, strict=True):
                np.testing.assert_allclose(row, alone[i].step(token), rtol=0, atol=1e-4)
                assert (together[i].position, together[i].live_slots) == (alone[i].position, alone[i].live_slots)
            for session, logits_before in resting:
                np.testing.assert_array_equal(session.logits(), logits_before)
            shared += len(stepping) > 1
        assert shared > 100, "most steps have to be of several sessions"
        for one, other, start in zip(together, alone, before, strict=True):
            counted = {name: value - start[name] for name, value in one.counters.items()}
            assert counted == other.counters  # which began at 0
            assert counted["fusions"] >= 2, "every session has to fuse several times"
            one.close()
            other.close()


def test_numbers_depend_on_neither_place_nor_neighbours(any_model: Model) -> None:
    """Bit for bit: first and alone in the batch, or last beside two sessions of other lengths."""
    tokens = text(60, seed=3)
    with Batch(any_model) as batch:
        first, last = read(any_model, 10), read(any_model, 10)
        others = [read(any_model, 5, seed=1), read(any_model, 33, seed=2)]
        batch.add(first)
        expected = [batch.step([first], [token])[0] for token in tokens]
        batch.remove(first)
        for session in (*others, last):
            batch.add(session)
        for i, token in enumerate(tokens):
            logits = batch.step([*others, last], [token, tokens[-i], token])
            np.testing.assert_array_equal(logits[-1], expected[i])
        assert last.state() == first.state()


def test_float16(tmp_path: Path) -> None:
    half = export_tiny(tmp_path / "half", small_cache(), dtype="float16", batch=SIZE)
    with Model(half) as model, Batch(model) as batch:
        sessions = [read(model, n, seed=n) for n in (3, 20)]
        alone = [s.clone() for s in sessions]
        for session in sessions:
            batch.add(session)
        for token in text(4):  # before a fusion: selections may differ afterwards
            logits = batch.step(sessions, [token, token])
            np.testing.assert_allclose(logits, [s.step(token) for s in alone], rtol=0, atol=3e-2)


def test_state_files_move_between_batches_and_single_sessions(any_model: Model, tmp_path: Path) -> None:
    tokens = text(40, seed=5)
    with Batch(any_model) as batch, any_model.session() as other:
        session = read(any_model, 11)
        batch.add(session)
        for token in tokens[:20]:
            batch.step([session], [token])
        inside = session.state()
        session.save(tmp_path / "state")
        clone = session.clone()
        batch.remove(session)
        assert session.state() == inside == clone.state() == (tmp_path / "state").read_bytes()
        other.load(tmp_path / "state")
        for token in tokens[20:]:
            expected = session.step(token)
            np.testing.assert_array_equal(clone.step(token), expected)
            np.testing.assert_array_equal(other.step(token), expected)
        reread = any_model.session()
        reread.load(tmp_path / "state")
        batch.add(reread)
        for token in tokens[20:]:
            logits = batch.step([reread], [token])[0]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_batched_graph_changes_nothing_else(plain_bundle: Path, tmp_path: Path) -> None:
    """The same files and the same identity: states move between the bundles."""
    single = export_tiny(tmp_path / "single", small_cache())
    names = {p.name for p in plain_bundle.iterdir()}
    assert names - {p.name for p in single.iterdir()} == {f"decoder_1_batch_{SIZE}.onnx"}
    for name in names - {f"decoder_1_batch_{SIZE}.onnx", MANIFEST_NAME}:
        assert (single / name).read_bytes() == (plain_bundle / name).read_bytes()
    assert read_manifest(single).bundle_id == read_manifest(plain_bundle).bundle_id
    assert (read_manifest(single).max_batch, read_manifest(plain_bundle).max_batch) == (1, SIZE)
    with Session(single) as one, Session(plain_bundle) as other:
        one.prefill(text(50))
        other.set_state(one.state())
        np.testing.assert_array_equal(one.logits(), other.logits())


def test_no_session_reads_what_another_left(model: Model, batch: Batch) -> None:
    """A row in use before gives what a new one gives."""
    first, second = read(model, 40), read(model, 2, seed=1)
    alone = second.clone()
    batch.add(first)
    batch.step([first], [5])
    batch.remove(first)
    batch.add(second)
    np.testing.assert_allclose(batch.step([second], [6])[0], alone.step(6), rtol=0, atol=1e-5)


def test_an_empty_session_starts_in_a_batch(model: Model, batch: Batch) -> None:
    session, alone = model.session(), model.session()
    batch.add(session)
    for token in text(20):
        np.testing.assert_allclose(batch.step([session], [token])[0], alone.step(token), rtol=0, atol=1e-5)


# --- any number of prompts -------------------------------------------------------------------------------------------


def test_generate_many_gives_what_each_gives_alone(any_model: Model) -> None:
    prompts = [text(n, seed=n) for n in (1, 20, 3, 9, 50, 8, 2, 17)]
    params = [
        SamplingParams(
            temperature=0.7 * (i % 3),
            top_p=0.9,
            seed=i,
            max_tokens=10 + 7 * i,
            ignore_eos=i != 4,
            repetition_penalty=1.3,
            stop_token_ids=[9] if i == 5 else [],
            logprobs=2 if i == 6 else None,
        )
        for i in range(len(prompts))
    ]
    heard: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    with any_model.session() as alone:
        outputs = generate_many(any_model, prompts, params, lambda i, token: heard[i].append(token))
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            alone.reset()
            logprobs: list[TokenLogprobs] = []
            expected = list(alone.generate(prompt, p, logprobs=None if p.logprobs is None else logprobs))
            assert outputs[i].token_ids == expected == heard[i]
            assert outputs[i].finish_reason == ("length" if len(expected) == p.max_tokens else "stop")
            assert outputs[i].error is None
            ours, theirs = ([x.logprob for x in one] for one in (outputs[i].logprobs, logprobs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
            assert [list(x.top) for x in outputs[i].logprobs] == [list(x.top) for x in logprobs]


def test_generate_many_stops_where_it_is_told(model: Model) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    outputs = generate_many(model, [text(5), text(6)], params, lambda i, token: i == 1)
    assert [len(o.token_ids) for o in outputs] == [30, 1]
    assert [o.finish_reason for o in outputs] == ["length", "stop"]


def test_generate_many_of_nothing(model: Model) -> None:
    assert generate_many(model, []) == []
    output = generate_many(model, [[5]], SamplingParams(max_tokens=0))[0]
    assert (output.token_ids, output.finish_reason) == ([], "length")


def test_generate_many_checks_before_it_reads(model: Model) -> None:
    def forbidden(index: int, token: int) -> None:
        raise AssertionError("nothing may be generated")

    with pytest.raises(EmptyPromptError, match=r"prompts\[1\]"):
        generate_many(model, [[5], []], on_token=forbidden)
    with pytest.raises(TokenIdError, match=r"prompts\[2\]"):
        generate_many(model, [[5], [6], [VOCAB]], on_token=forbidden)
    with pytest.raises(InvalidArgumentError, match="params"):
        generate_many(model, [[5], [6]], [SamplingParams()], forbidden)
    with pytest.raises(InvalidArgumentError, match="stop_token_ids"):
        generate_many(model, [[5]], SamplingParams(stop=["a"]), forbidden)


def test_generate_many_goes_on_without_the_prompt_that_fails(model: Model) -> None:
    """A parameter that only the model can judge: a bias of a token that it does not have."""
    params = [SamplingParams(max_tokens=5), SamplingParams(max_tokens=5, logit_bias={VOCAB: 1.0})]
    outputs = generate_many(model, [text(5), text(5)], params)
    assert (outputs[0].finish_reason, len(outputs[0].token_ids)) == ("length", 5)
    assert (outputs[1].finish_reason, outputs[1].token_ids) == ("error", [])
    assert isinstance(outputs[1].error, InvalidArgumentError)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_bundle_without_a_batched_graph(tmp_path: Path) -> None:
    with Model(export_tiny(tmp_path / "single", small_cache())) as model:
        assert (model.max_batch, model.batch_bytes) == (1, 0)
        with pytest.raises(UnsupportedError, match="--batch"):
            Batch(model)
        with pytest.raises(UnsupportedError, match="--batch"):
            generate_many(model, [[5]])


@pytest.mark.parametrize("size", [0, -1, 1025, 2.0])
def test_batch_sizes_out_of_range(size: int, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="batch"):
        export_bundle(load_checkpoint(tmp_path / "model", policy="h2o", mem_size=12), tmp_path / "b", batch=size)
    assert not (tmp_path / "b").exists()


def test_memory_is_what_was_promised(model: Model, batch: Batch) -> None:
    """At least the states of its rows, and not twice as much; nothing where the sessions keep their states."""
    if batch.implementation == "loop":
        assert model.batch_bytes == 0
    else:
        assert SIZE * model.state_bytes < model.batch_bytes < 2 * SIZE * model.state_bytes


def test_a_session_in_a_batch_can_only_be_looked_at(model: Model, batch: Batch) -> None:
    session = read(model, 30)
    state = session.state()
    batch.add(session)
    for change in (
        lambda: session.prefill([5]),
        lambda: session.step(5),
        lambda: session.generate_all([]),
        session.reset,
        lambda: session.set_state(state),
    ):
        with pytest.raises(BusyError, match="batch"):
            change()
    assert session.state() == state
    assert session.sample() == int(session.logits().argmax())
    batch.remove(session)
    session.step(5)
    session.reset()


def test_one_bad_session_or_id_changes_none(model: Model, batch: Batch) -> None:
    inside, other, outside = read(model, 10), read(model, 20), read(model, 30)
    batch.add(inside)
    batch.add(other)
    states = [s.state() for s in (inside, other, outside)]
    with pytest.raises(TokenIdError, match=str(VOCAB - 1)):
        batch.step([inside, other], [5, VOCAB])
    with pytest.raises(TokenIdError):
        batch.step([inside, other], [-1, 5])
    with pytest.raises(InvalidArgumentError, match=r"session 1 of 2.*add it first"):
        batch.step([inside, outside], [5, 5])
    with pytest.raises(InvalidArgumentError, match="once"):
        batch.step([inside, inside], [5, 5])
    with pytest.raises(InvalidArgumentError, match="one for each of 2"):
        batch.step([inside, other], [5])
    with pytest.raises(EmptyPromptError):
        batch.step([], [])
    assert [s.state() for s in (inside, other, outside)] == states
    batch.step([inside, other], [5, 5])


def test_a_cancelled_session_is_not_stepped(model: Model, batch: Batch) -> None:
    sessions = [read(model, 10), read(model, 20)]
    for session in sessions:
        batch.add(session)
    sessions[1].cancel()
    with pytest.raises(CancelledError, match="session 1 of 2"):
        batch.step(sessions, [5, 5])
    assert [s.position for s in sessions] == [10, 20]
    batch.step(sessions[:1], [5])
    sessions[1].cancel(False)
    batch.step(sessions, [5, 5])


def test_sessions_of_a_pool(model: Model, batch: Batch, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        session, alone = pool.acquire("a"), model.session()
        session.prefill(text(20))
        alone.prefill(text(20))
        batch.add(session)
        batch.step([session], [5])
        session.close()  # leaves the batch first
        assert batch.sessions == ()
        pool.acquire("b").close()  # parks it
        alone.step(5)
        np.testing.assert_allclose(pool.acquire("a").step(6), alone.step(6), rtol=0, atol=1e-5)


def test_who_may_join_and_leave(backend: Backend, model: Model, batch: Batch) -> None:
    sessions = [read(model, n + 1) for n in range(SIZE + 1)]
    for session in sessions[:SIZE]:
        batch.add(session)
    with pytest.raises(InvalidArgumentError, match="all 3 rows"):
        batch.add(sessions[SIZE])
    with pytest.raises(InvalidArgumentError, match="this one"):
        batch.add(sessions[0])
    with pytest.raises(InvalidArgumentError, match="none"):
        batch.remove(sessions[SIZE])
    with Batch(model) as second:
        with pytest.raises(InvalidArgumentError, match="another"):
            second.add(sessions[0])
        with pytest.raises(InvalidArgumentError, match="another"):
            second.remove(sessions[0])
        other = backend.bundle("batch-lococo-gqa")
        with Session(other, **backend.options) as stranger, pytest.raises(InvalidArgumentError, match="model"):
            second.add(stranger)
        batch.remove(sessions[0])
        second.add(sessions[0])
        second.step([sessions[0]], [5])


def test_closing_in_any_order(backend: Backend) -> None:
    model = Model(backend.bundle("batch-lococo-gqa"), **backend.options)
    batch = Batch(model)
    kept, closed = read(model, 10), read(model, 20)
    alone = kept.clone()
    batch.add(kept)
    batch.add(closed)
    closed.close()
    assert batch.sessions == (kept,)
    model.close()
    batch.step([kept], [5])
    batch.close()
    batch.close()
    np.testing.assert_allclose(kept.logits(), alone.step(5), rtol=0, atol=1e-5)
    kept.step(6)
    for use in (lambda: batch.step([kept], [5]), lambda: batch.add(kept), lambda: Batch(model)):
        with pytest.raises(ClosedError):
            use()
    kept.close()
    alone.close()


def test_two_threads_in_one_batch(model: Model, batch: Batch) -> None:
    session = read(model, 5)
    batch.add(session)
    refused, read_tokens, done = 0, [], threading.Event()

    def step() -> None:
        for _ in range(2000):
            with contextlib.suppress(BusyError):
                batch._step([session], [5])
                read_tokens.append(5)
        done.set()

    thread = threading.Thread(target=step)
    thread.start()
    while not done.is_set():
        try:
            batch.add(session)
        except BusyError:
            refused += 1
        except InvalidArgumentError:
            pass
    thread.join()
    assert refused, "a call from a second thread has to be refused while the first one runs"
    assert session.position == 5 + len(read_tokens)


# --- a backend that fails --------------------------------------------------------------------------------------------


def fail_on(bundle: Path, name: str, condition: list[onnx.NodeProto], output: str) -> None:
    """Edits a graph so that its run fails where the int64 tensor `index` that `condition` computes is not 0."""
    path = bundle / name
    graph_model = onnx.load(path, load_external_data=False)
    graph = graph_model.graph
    for node in graph.node:
        for i, made in enumerate(node.output):
            if made == output:
                node.output[i] = "unguarded"
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    graph.node.extend(
        [
            *condition,
            helper.make_node("Constant", [], ["one"], value=one),
            helper.make_node("Gather", ["one", "index"], ["guard"]),  # out of bounds unless it is 0
            helper.make_node("Mul", ["unguarded", "guard"], [output]),
        ]
    )
    path.write_bytes(graph_model.SerializeToString())
    manifest = read_manifest(bundle)
    files = tuple(file_entry(bundle, f.path) for f in manifest.files)
    (bundle / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json())


def fail_on_seven(bundle: Path, graph: str) -> None:
    """Makes a decoder fail when one of its tokens is 7."""
    seven = helper.make_tensor("seven", TensorProto.INT32, [1], [7])
    condition = [
        helper.make_node("Constant", [], ["seven"], value=seven),
        helper.make_node("Equal", ["input_ids", "seven"], ["is_seven"]),
        helper.make_node("Cast", ["is_seven"], ["flags"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["flags"], ["index"], keepdims=0),
    ]
    fail_on(bundle, graph, condition, "logits")


def test_a_forward_that_fails_leaves_all_as_they_were(plain_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(plain_bundle, tmp_path / "b"))
    fail_on_seven(broken, f"decoder_1_batch_{SIZE}.onnx")
    with Model(broken) as model, Batch(model) as batch:
        sessions = [read(model, n) for n in (4, 16)]
        for session in sessions:
            batch.add(session)
        states = [s.state() for s in sessions]
        with pytest.raises(BackendError, match="ONNX Runtime"):
            batch.step(sessions, [5, 7])
        assert [s.state() for s in sessions] == states
        batch.step(sessions, [5, 6])


def test_a_fusion_that_fails_stops_one_session(plain_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(plain_bundle, tmp_path / "b"))
    condition = [
        helper.make_node("ReduceMax", ["scores.0"], ["most"], keepdims=0),
        helper.make_node("Ceil", ["most"], ["above"]),
        helper.make_node("Cast", ["above"], ["index"], to=TensorProto.INT64),
    ]
    fail_on(broken, "fusion_1.onnx", condition, "present.1.value")
    with Model(broken) as model, Model(plain_bundle) as sound, Batch(model) as batch:
        full, first, last = read(model, 16), read(model, 4), read(model, 6)
        assert full.live_slots == model.manifest.cache.capacity
        alone = [s.clone() for s in (first, last)]
        for session in (first, full, last):
            batch.add(session)
        state = full.state()
        with pytest.raises(BackendError):
            batch.step([first, full, last], [5, 5, 5])
        assert full.state() == state
        for one, other in zip((first, last), alone, strict=True):
            assert one.position == other.position + 1
            np.testing.assert_allclose(one.logits(), other.step(5), rtol=0, atol=1e-5)
        with sound.session() as elsewhere:  # it can go on where the graph is sound
            elsewhere.set_state(full.state())
            elsewhere.step(5)


def test_generate_many_reports_the_prompt_that_fails(plain_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(plain_bundle, tmp_path / "b"))
    fail_on_seven(broken, "decoder_1.onnx")  # reads prompts of one token
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with Model(broken) as model:
        outputs = generate_many(model, [[5, 6], [7], [5], [6]], params)
    assert [o.finish_reason for o in outputs] == ["length", "error", "length", "length"]
    assert isinstance(outputs[1].error, BackendError)
    assert [len(o.token_ids) for o in outputs] == [5, 0, 5, 5]
