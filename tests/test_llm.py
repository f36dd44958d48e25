"""Text in, text out: streaming, stops, cancelling, asyncio, conversations."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import EOS, byte_tokenizer
from conftest import Backend
from lococo_runtime import (
    LLM,
    BusyError,
    Chat,
    ChatTemplateError,
    ClosedError,
    CompletionOutput,
    CorruptError,
    EmptyPromptError,
    InvalidArgumentError,
    SamplingParams,
    Session,
    TokenIdError,
    UnsupportedError,
)
from lococo_runtime import completion as completion_module
from lococo_runtime._detokenizer import Detokenizer
from lococo_runtime.llm import load_tokenizer, stream_text
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing

ROOT = Path(__file__).parents[1]
SMOLLM2 = Path(os.environ.get("LOCOCO_SMOLLM2", ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"))
smollm2 = [
    pytest.mark.smollm2,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing: run scripts/fetch_smollm2.py"),
]


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    return cpu.bundle("text")


@pytest.fixture(scope="module")
def llm(backend: Backend) -> Iterator[LLM]:
    with LLM(backend.bundle("text"), **backend.options) as opened:
        yield opened


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 5, **changes})


# --- detokenising ----------------------------------------------------------------------------------------------------


def words_tokenizer(decoder: Any) -> Tokenizer:
    """Single bytes as <0xNN> and some words, as converted from SentencePiece."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    for token in ("▁", "▁a", "b", "<unk>", "▁▁", "▁hello", "世界", "x▁", "\u200d", "👩", ".", "##c"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("hé llo▁"), AddedToken(" ")])
    return tokenizer


def decoder_cases() -> dict[str, Any]:
    space, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    return {
        "llama2": decoders.Sequence([space, fallback, fuse, decoders.Strip(" ", 1, 0)]),
        "gemma": decoders.Sequence([space, fallback, fuse]),
        "strip-three": decoders.Sequence([space, fallback, fuse, decoders.Strip(" ", 3, 0)]),
        "no-bytes": decoders.Sequence([space, fuse]),
        "metaspace": decoders.Metaspace(),
        "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
        "wordpiece": decoders.WordPiece(),
        "none": None,
    }


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """A few tokens, from a few: ids outside the vocabulary, special ones, and bytes that are no UTF-8 among them."""
    size = tokenizer.get_vocab_size()
    pool = [rng.randrange(size + 3) for _ in range(rng.choice([3, 10, 300]))]
    if rng.random() < 0.4:
        pool = [b for b in range(256) if 0x80 <= b < 0xC0 or rng.random() < 0.1]
    return [rng.choice(pool) for _ in range(rng.randrange(16))]


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    stream = detokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", [*decoder_cases(), "bytes"])
def test_pieces_add_up_to_the_decoded_whole(name: str) -> None:
    if name == "bytes":
        tokenizer = byte_tokenizer("<s>")
        tokenizer.add_tokens([AddedToken("日本 x"), AddedToken("é")])
    else:
        tokenizer = words_tokenizer(decoder_cases()[name])
    detokenizer = Detokenizer(tokenizer)
    rng = random.Random(0)
    for _ in range(2_000):
        ids = random_ids(tokenizer, rng)
        assert "".join(pieces_of(detokenizer, ids)) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("ids", [pytest.param(None, marks=smollm2)])
def test_pieces_of_real_text_and_random_tokens_as_transformers_decodes_them(ids: None) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SMOLLM2)
    tokenizer = load_tokenizer(SMOLLM2)
    detokenizer = Detokenizer(tokenizer)
    rng = random.Random(1)
    text = "naïve 漢字 🙂 👩‍👩‍👧‍👦 e\u0301 हिन्दी \u200f שלום\t\r\n  x = {'a': 1}\0 <|im_end|> end"
    streams = [tokenizer.encode(text).ids, *([rng.randrange(49_160) for _ in range(200)] for _ in range(10))]
    for stream in streams:
        pieces = pieces_of(detokenizer, stream)
        assert "".join(pieces) == theirs.decode(stream, skip_special_tokens=True)
    assert all("�" not in piece for piece in pieces_of(detokenizer, streams[0]))


def test_a_piece_is_whole_characters() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve 漢字 👩‍👩‍👧!"
    pieces = list(stream_text(tokenizer, iter(tokenizer.encode(text).ids)))
    assert pieces == list(text)


def test_a_long_stream_looks_at_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens, many of them half a character for ever: no work grows with what came before."""
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    stream = detokenizer.stream()
    looked_up = 0
    entry = detokenizer.token

    def counted(token_id: int) -> str:
        nonlocal looked_up
        looked_up += 1
        return entry(token_id)

    monkeypatch.setattr(detokenizer, "token", counted)
    rng = random.Random(0)
    length = sum(len(stream.push(token)) for token in rng.choices(range(256), k=1_000_000)) + len(stream.flush())
    assert length > 500_000
    assert looked_up == 256


def test_decoders_that_look_ahead_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="CTC"):
        Detokenizer(words_tokenizer(decoders.CTC()))
    with pytest.raises(UnsupportedError, match="Strip"):
        Detokenizer(words_tokenizer(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])))


# --- completing ------------------------------------------------------------------------------------------------------


def test_streaming_gives_what_generate_gives(llm: LLM) -> None:
    for seed in range(10):
        whole = llm.generate("Hello", params(seed=seed))
        stream = llm.generate_stream("Hello", params(seed=seed))
        pieces = list(stream)
        assert "".join(pieces) == whole.text == llm.tokenizer.decode(whole.token_ids)
        assert "" not in pieces
        assert stream.output == whole
        assert (whole.finish_reason, len(whole.token_ids), whole.num_prompt_tokens) == ("length", 40, 5)


def test_a_prompt_may_be_token_ids(llm: LLM) -> None:
    assert llm.generate(llm.encode("Hello"), params()) == llm.generate("Hello", params())


def test_end_of_sequence_and_stop_tokens_are_in_the_ids_and_not_in_the_text(llm: LLM) -> None:
    bias = {EOS: 100.0}
    out = llm.generate("Hello", SamplingParams(logit_bias=bias))
    assert (out.token_ids, out.text, out.finish_reason, out.stop_reason) == ([EOS], "", "stop", None)
    free = llm.generate("Hello", params())
    stop = free.token_ids[10]
    out = llm.generate("Hello", params(stop_token_ids=[stop]))
    end = free.token_ids.index(stop)
    assert out.token_ids == free.token_ids[: end + 1]
    assert out.text == llm.tokenizer.decode(free.token_ids[:end])
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_stop_strings_end_the_text_and_never_leak(llm: LLM) -> None:
    """The stop string is cut out of a text that the model is known to write, at many places."""
    rng = random.Random(0)
    for seed in range(20):
        free = llm.generate("Hello", params(seed=seed)).text
        first = rng.randrange(len(free) - 4)
        stop = free[first : first + rng.randrange(1, 4)]
        stream = llm.generate_stream("Hello", params(seed=seed, stop=["never in it", stop]))
        pieces = list(stream)
        assert "".join(pieces) == stream.output.text == free[: free.index(stop)]
        assert (stream.output.finish_reason, stream.output.stop_reason) == ("stop", stop)


def test_a_stop_string_that_is_never_complete_comes_out(llm: LLM) -> None:
    free = llm.generate("Hello", params())
    out = llm.generate("Hello", params(stop=[free.text[-2:] + "and more"]))
    assert out == free


def test_chunks_carry_ids_and_log_probabilities(llm: LLM) -> None:
    stream = llm.generate_stream("Hello", params(logprobs=3))
    chunks = list(stream.chunks())
    out = stream.output
    assert [k.token_id for k in chunks] == out.token_ids
    assert [k.logprobs for k in chunks] == out.logprobs
    assert "".join(k.text for k in chunks) == out.text
    assert [k.finish_reason for k in chunks] == [None] * 39 + ["length"]
    assert out.logprobs is not None
    with llm.model.session() as session:
        session.prefill(llm.encode("Hello"))
        for token, entry in zip(out.token_ids, out.logprobs, strict=True):
            assert entry == session.logprobs(token, 3)
            session.step(token)


def test_no_tokens_asked_for(llm: LLM) -> None:
    out = llm.generate("Hello", SamplingParams(max_tokens=0, logprobs=0))
    assert out == CompletionOutput("", [], "length", logprobs=[], num_prompt_tokens=5)


def test_a_session_that_is_passed_in_is_continued(llm: LLM, tmp_path: Path) -> None:
    """As if the texts had been read at once, block by block."""
    with llm.model.session() as session, llm.model.session() as plain:
        first = llm.generate("x" * 32, params(), session=session)
        second = llm.generate("and", params(), session=session)
        third = llm.generate("", params(), session=session)
        assert session.position == 32 + 39 + 3 + 39 + 39
        assert (second.num_cached_tokens, second.num_prompt_tokens) == (71, 74)
        expected = [list(plain.generate(llm.encode("x" * 32), params()))]
        expected.append(list(plain.generate(llm.encode("and"), params())))
        expected.append(list(plain.generate([], params())))
        assert [first.token_ids, second.token_ids, third.token_ids] == expected
        stream = llm.generate_stream("Hello", params(), session=session)
        before = session.position
        stream.result()
        assert stream.read_ids == [*llm.encode("Hello"), *stream.output.token_ids[:-1]]
        assert session.position == before + len(stream.read_ids)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.generate(""), EmptyPromptError, "empty"),
        (lambda m: m.generate([]), EmptyPromptError, "empty"),
        (lambda m: m.generate([5, 260]), TokenIdError, "259"),
        (lambda m: m.generate([0.5]), InvalidArgumentError, "integers"),
        (lambda m: m.generate("\ud800"), InvalidArgumentError, "Unicode"),
        (lambda m: m.generate(None), InvalidArgumentError, "integers"),
        (lambda m: m.generate(5), InvalidArgumentError, "one dimension"),
        (lambda m: m.generate("x", {"temperature": 1.0}), InvalidArgumentError, "params: expected SamplingParams"),
        (lambda m: m.generate("x", grammar="[a]"), InvalidArgumentError, "grammar: expected Grammar, got str"),
        (lambda m: m.generate("x", SamplingParams(stop_token_ids=[260])), TokenIdError, "stop_token_ids"),
        (lambda m: m.generate("x", SamplingParams(logit_bias={260: 1})), TokenIdError, "logit_bias"),
        (lambda m: m.generate("x", SamplingParams(logprobs=261)), InvalidArgumentError, "logprobs"),
        (lambda m: m.generate("x", SamplingParams(stop=["x"] * 65)), InvalidArgumentError, "64"),
        (lambda m: m.generate("x", SamplingParams(stop=["\ud800"])), InvalidArgumentError, "UTF-8"),
        (lambda m: m.generate("x", SamplingParams(max_tokens=-1)), InvalidArgumentError, "max_tokens"),
        (lambda m: m.generate("x", SamplingParams(max_tokens=2**31)), InvalidArgumentError, "max_tokens"),
        (lambda m: m.chat([]), InvalidArgumentError, "at least one"),
        (lambda m: m.chat([{"role": "user", "content": [1]}, 3]), InvalidArgumentError, "messages"),
        (lambda m: m.chat([{"role": "user", "content": "x"}], tools=[object()]), InvalidArgumentError, "tools"),
        (lambda m: m.generate("x", n=2), TypeError, "n"),
        (lambda m: m.chat([{"role": "user", "content": "x"}], temperature=1), TypeError, "temperature"),
    ],
)
def test_bad_input_is_refused_at_once(llm: LLM, call: Any, error: type[Exception], says: str) -> None:
    before = llm.generate("Hello", params())
    with pytest.raises(error, match=says):
        call(llm)
    assert llm.generate("Hello", params()) == before


def test_bad_input_leaves_a_session_as_it_was(llm: LLM) -> None:
    with llm.model.session() as session:
        llm.generate("Hello", params(), session=session)
        state = session.state()
        for bad in ({"stop_token_ids": [999]}, {"logit_bias": {999: 1.0}}, {"logprobs": 999}):
            with pytest.raises(InvalidArgumentError):
                llm.generate("Hello", params(**bad), session=session)
        assert session.state() == state


def test_a_session_of_another_bundle_is_refused(llm: LLM, backend: Backend) -> None:
    with Session(backend.bundle("grammar"), **backend.options) as other:
        with pytest.raises(InvalidArgumentError, match="one of another"):
            llm.generate("Hello", session=other)
        with pytest.raises(InvalidArgumentError, match="one of another"):
            llm.read("Hello", other)
        with pytest.raises(InvalidArgumentError, match="one of another"):
            Chat(llm, session=other)
        assert other.position == 0


def test_a_broken_tokenizer_is_corrupt(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_training_settings_do_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("Hello there").ids) == 11


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancel_before_the_start_reads_nothing(llm: LLM) -> None:
    with llm.model.session() as session:
        stream = llm.generate_stream("Hello", params(), session=session)
        stream.cancel()
        assert list(stream) == []
        assert stream.output.finish_reason == "cancelled"
        assert session.position == 0


def test_cancel_ends_within_a_token(llm: LLM) -> None:
    whole = llm.generate("Hello", params())
    with llm.model.session() as session:
        stream = llm.generate_stream("Hello", params(), session=session)
        chunks = []
        for chunk in stream.chunks():
            chunks.append(chunk)
            if len(chunks) == 10:
                thread = threading.Thread(target=stream.cancel)
                thread.start()
                thread.join()
        assert chunks[-1].finish_reason == stream.output.finish_reason == "cancelled"
        assert stream.output.token_ids == whole.token_ids[:10]
        assert stream.output.text == llm.tokenizer.decode(whole.token_ids[:10])
        assert session.position == 5 + 9
        stream.cancel()  # after the end
        rest = llm.generate(whole.token_ids[9:10], params(max_tokens=30), session=session)
        assert rest.token_ids == whole.token_ids[10:]


def test_cancel_in_the_middle_of_a_long_prompt(llm: LLM) -> None:
    with llm.model.session() as session:
        stream = llm.generate_stream([7] * 2_000_000, params(), session=session)
        thread = threading.Thread(target=lambda: list(stream))
        thread.start()
        while stream._session is None:
            pass
        stream.cancel()
        thread.join()
        assert stream.output.finish_reason == "cancelled"
        assert session.position < 2_000_000
        assert stream.read_ids == [7] * session.position
        assert llm.generate("x", params(), session=session).finish_reason == "length"


def test_cancel_from_many_threads_at_any_time(llm: LLM) -> None:
    """Whenever it comes, what there is is the beginning of the whole."""
    whole = llm.generate("Hello", params())
    rng = random.Random(0)
    for _ in range(40):
        stream = llm.generate_stream("Hello", params())
        timers = [threading.Timer(rng.random() * 0.02, stream.cancel) for _ in range(3)]
        for timer in timers:
            timer.start()
        out = stream.result()
        for timer in timers:
            timer.join()
        assert out.token_ids == whole.token_ids[: len(out.token_ids)]
        assert out.finish_reason == ("length" if len(out.token_ids) == 40 else "cancelled")


def test_a_stream_that_is_left_gives_its_session_back(llm: LLM) -> None:
    with llm.model.session() as session:
        stream = llm.generate_stream("Hello", params(), session=session)
        next(stream)
        with pytest.raises(BusyError, match="stream"):
            llm.generate("x", params(), session=session)
        del stream
        assert llm.generate("x", params(), session=session).finish_reason == "length"
        with llm.generate_stream("Hello", params(), session=session) as stream:
            next(stream)
        assert stream.output.finish_reason == "cancelled"
        assert llm.generate("x", params(), session=session).finish_reason == "length"
    assert not completion_module._claimed


def test_a_session_that_is_closed_in_the_middle_of_a_stream(llm: LLM) -> None:
    session = llm.model.session()
    stream = llm.generate_stream("Hello", params(), session=session)
    next(stream)
    session.close()
    stream.cancel()
    stream.close()
    assert stream.output.finish_reason == "cancelled"
    assert stream.read_ids is None
    assert not completion_module._claimed


def test_a_stream_is_one_threads(llm: LLM) -> None:
    stream = llm.generate_stream([7] * 200_000, params())
    thread = threading.Thread(target=lambda: next(stream, None))
    thread.start()
    while stream._session is None:
        pass
    with pytest.raises(BusyError, match="another thread"):
        next(stream)
    stream.cancel()
    thread.join()
    stream.close()


def test_closing_in_the_middle(backend: Backend) -> None:
    llm = LLM(backend.bundle("text"), **backend.options)
    whole = llm.generate("Hello", params())
    stream = llm.generate_stream("Hello", params())
    next(stream)
    llm.close()
    assert stream.result() == whole
    with pytest.raises(ClosedError):
        llm.generate("Hello", params())


# --- asyncio ---------------------------------------------------------------------------------------------------------


def test_async_gives_the_same(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    async def run() -> None:
        assert await llm.agenerate("Hello", params()) == llm.generate("Hello", params())
        assert await llm.achat(messages, params()) == llm.chat(messages, params())
        stream = llm.agenerate_stream("Hello", params())
        assert "".join([piece async for piece in stream]) == stream.output.text
        chat = llm.achat_stream(messages, params(logprobs=1))
        assert [k.token_id async for k in chat.chunks()] == chat.output.token_ids
        many = await asyncio.gather(*(llm.agenerate("Hello", params(seed=i)) for i in range(12)))
        assert many == [llm.generate("Hello", params(seed=i)) for i in range(12)]

    asyncio.run(run())


def test_a_cancelled_task_cancels_the_completion(llm: LLM) -> None:
    async def run() -> None:
        with llm.model.session() as session:
            stream = llm.agenerate_stream([7] * 2_000_000, params(), session=session)
            task = asyncio.create_task(stream.result())
            while stream._stream._session is None:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await stream.aclose()
            assert session.position < 2_000_000
            out = await llm.agenerate("x", params(), session=session)
            assert out.finish_reason == "length"

    asyncio.run(run())
    assert not completion_module._claimed


def test_async_after_close(backend: Backend) -> None:
    async def run() -> None:
        llm = LLM(backend.bundle("text"), **backend.options)
        stream = llm.agenerate_stream("Hello", params())
        await stream.next_chunk()
        llm.close()
        for call in (stream.next_chunk(), llm.agenerate("Hello", params())):
            with pytest.raises(ClosedError):
                await call

    asyncio.run(run())
    assert not completion_module._claimed


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read_is_prefill_in_blocks(llm: LLM) -> None:
    text, seen = "naïve 漢字 " * 10, []
    ids = llm.encode(text)
    with llm.model.session() as session, llm.model.session() as plain:
        assert llm.read(text, session, progress=lambda *step: seen.append(step)) == len(ids)
        plain.prefill(ids)
        assert session.state() == plain.state()
        assert seen == [(min(done, len(ids)), len(ids)) for done in range(16, len(ids) + 16, 16)]
        assert llm.read([5, 6], session) == 2
        for wrong, error in (("", EmptyPromptError), ([], EmptyPromptError), ([1] * 20 + [999], TokenIdError)):
            with pytest.raises(error, match="prompt"):
                llm.read(wrong, session)
        assert session.position == len(ids) + 2


def test_read_begins_a_text_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a tokenizer puts before a text come at position 0 only."""
    begin = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)])
    monkeypatch.setattr(llm.tokenizer, "post_processor", begin)
    with llm.model.session() as session:
        assert [llm.read("abc", session) for _ in range(2)] == [4, 3]


# --- conversations ---------------------------------------------------------------------------------------------------


def test_chat_reads_the_rendered_conversation(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = llm.apply_chat_template(messages)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    out = llm.chat(messages, params())
    assert out == llm.generate(llm.encode(text, add_special_tokens=False), params())
    assert "".join(llm.chat_stream(messages, params())) == out.text


def test_a_turn_reads_only_what_is_new(llm: LLM) -> None:
    """The same tokens, turn by turn, in the conversation's own session; seeds whose answers are valid text."""
    with Chat(llm, [{"role": "system", "content": "Be brief."}]) as chat:
        read = 0
        for turn in range(4):
            out = chat.send("Tell me more.", params(logit_bias={i: -100.0 for i in range(94, 260)}, seed=turn))
            text = llm.apply_chat_template(chat.messages[:-1])
            assert out.num_prompt_tokens == len(llm.encode(text, add_special_tokens=False))
            assert out.num_cached_tokens == read
            read = chat.session.position
            assert read == out.num_prompt_tokens + 39
        assert [m["role"] for m in chat.messages] == ["system"] + ["user", "assistant"] * 4
        with llm.model.session() as plain:
            plain.prefill(chat._read or [])
            assert plain.position == chat.session.position


def test_a_turn_that_ended_by_itself_is_continued(llm: LLM) -> None:
    """The end-of-sequence token is in the template, too: it is read once."""
    with Chat(llm) as chat:
        chat.send("Hi", SamplingParams(logit_bias={EOS: 100.0}))
        assert chat.messages[-1] == {"role": "assistant", "content": ""}
        out = chat.send("Hi", SamplingParams(logit_bias={EOS: 100.0}))
        assert out.num_cached_tokens > 0
        assert chat._read == llm.encode(llm.apply_chat_template(chat.messages[:-1]), add_special_tokens=False)


def test_a_text_in_other_tokens_than_the_tokenizers_is_continued(bundle: Path) -> None:
    """The tokenizer would write "ab" as one token, and the model wrote two."""
    spec = json.loads(byte_tokenizer().to_str())
    ids = [spec["model"]["vocab"][c] for c in "ab"]
    spec["model"]["vocab"]["ab"] = 256
    spec["model"]["merges"] = [["a", "b"]]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with LLM(bundle) as llm, Chat(llm) as chat:
        llm.tokenizer, llm.detokenizer = tokenizer, Detokenizer(tokenizer)
        assert llm.encode("ab") == [256]
        only = {i: -1000.0 for i in range(260) if i not in ids}
        out = chat.send("Hi", params(logit_bias=only, temperature=3.0))
        assert "ab" in out.text
        again = chat.send("Hi", params(logit_bias=only))
        assert again.num_cached_tokens == out.num_prompt_tokens + 39
        assert llm.detokenizer.whole_text(chat._read or []) == llm.apply_chat_template(chat.messages[:-1]) + (
            llm.tokenizer.decode(again.token_ids[:-1])
        )


def test_a_conversation_that_was_changed_is_read_again(llm: LLM) -> None:
    with Chat(llm) as chat:
        chat.send("Hi", params())
        chat.messages[0] = {"role": "user", "content": "Hello"}
        out = chat.send("More", params())
        assert out.num_cached_tokens == 0
        assert chat.session.position == out.num_prompt_tokens + 39
        assert llm.chat(chat.messages[:-1], params()) == out


def test_a_stateless_client_continues_too(llm: LLM) -> None:
    with Chat(llm) as chat:
        history: list[Any] = [{"role": "user", "content": "Hi"}]
        bias = {i: -100.0 for i in range(94, 260)}
        for turn in range(3):
            out = chat.answer(history, params(logit_bias=bias)).result()
            assert (out.num_cached_tokens > 0) == (turn > 0)
            history += [{"role": "assistant", "content": out.text}, {"role": "user", "content": "More"}]


def test_a_chat_behind_a_document(llm: LLM) -> None:
    """Starting over goes back to the document, which is not read again."""
    with llm.model.session() as document:
        document.prefill(llm.encode("A long document. " * 10))
        start = document.position
        with Chat(llm, session=document.clone()) as chat, Chat(llm, session=document.clone()) as other:
            chat.send("Hi", params())
            chat.messages.clear()
            out = chat.send("What does it say?", params())
            assert out == other.send("What does it say?", params())
            assert chat.session.position == start + out.num_prompt_tokens + 39


def test_turns_that_fail_or_are_cancelled_change_no_messages(llm: LLM) -> None:
    with Chat(llm) as chat:
        chat.send("Hi", params())
        before = list(chat.messages)
        with pytest.raises(InvalidArgumentError):
            chat.send("x", params(stop_token_ids=[999]))
        with pytest.raises(InvalidArgumentError):
            chat.send({"role": "user", "content": object()}, params())
        stream = chat.stream("x", params())
        stream.cancel()
        assert stream.result().finish_reason == "cancelled"
        early, late = chat.stream("one", params()), chat.stream("two", params())
        assert chat.messages == before
        late.result()
        with pytest.raises(BusyError, match="turn"):
            next(early)
        assert [m["content"] for m in chat.messages[-2:]] == ["two", late.output.text]


def test_a_cancelled_answer_stays_in_the_conversation(llm: LLM) -> None:
    with Chat(llm) as chat:
        stream = chat.stream("Hi", params(logit_bias={i: -100.0 for i in range(94, 260)}))
        text = next(stream) + next(stream)
        stream.close()
        assert chat.messages[-1] == {"role": "assistant", "content": text}
        assert chat.send("More", params()).num_cached_tokens > 0


def test_chat_needs_a_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.chat_template, "templates", {})
    with pytest.raises(ChatTemplateError, match="none"):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_a_chat_from_asyncio(llm: LLM) -> None:
    async def run() -> None:
        with Chat(llm) as one, Chat(llm) as two:
            first = await one.asend("Hi", params())
            assert first == two.send("Hi", params())
            assert "".join([p async for p in one.astream("More", params())]) == two.send("More", params()).text

    asyncio.run(run())
