"""A completion while it is made: tokens become text, and text, tokens or another thread end it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeVar

from . import _c_api as c
from ._detokenizer import Detokenizer
from ._exceptions import BusyError, CancelledError, ClosedError
from .grammar import GrammarState, Mask
from .sampling import SamplingParams, StopMatcher, TokenLogprobs
from .session import Session

T = TypeVar("T")

FinishReason = Literal["stop", "length", "cancelled"]
"""The model, a stop string, a stop token or the grammar ended it; max_tokens did; `cancel` did."""

Step = Callable[[Session, int], object]
"""Reads a token in a session, in place of `Session.step`."""


@dataclass(frozen=True)
class CompletionOutput:
    """What was generated.

    Attributes:
        text: without special tokens, the token that ended it, and the stop string.
        token_ids: all of them, the one that ended it included.
        finish_reason: None as long as it goes on.
        stop_reason: the stop string or the id in stop_token_ids that ended it, else None.
        logprobs: an entry for each of token_ids, or None if params.logprobs is None.
        num_prompt_tokens: of the prompt, those that the session had read before included.
        num_cached_tokens: of those, how many the session had read before.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class CompletionChunk:
    """What a token added: whole characters, perhaps none yet; the last chunk has a finish_reason.

    Attributes:
        text: to be appended to what came before.
        token_id: None in a last chunk that brings no token: cancelled, or no token asked for.
        logprobs: of this token, or None if params.logprobs is None.
        finish_reason, stop_reason: as `CompletionOutput`'s.
    """

    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class CompletionBuilder:
    """Token ids in, chunks of text out. Knows nothing of a session: whoever steps sessions can use it.

    Args:
        detokenizer: of the bundle.
        params: stop, stop_token_ids, max_tokens and logprobs are used here.
        eos_token_ids: of the bundle.
        grammar: at its beginning, or None.

    Attributes:
        token_ids: pushed so far.
        finish_reason, stop_reason: as in `CompletionOutput`; None before the end.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        params: SamplingParams,
        eos_token_ids: Collection[int],
        grammar: GrammarState | None = None,
    ) -> None:
        self._params = params
        self._eos = set() if params.ignore_eos else set(eos_token_ids)
        self._detokenizer = detokenizer.stream()
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._grammar = grammar
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def allowed_tokens(self) -> Mask | None:
        """For the next token: a mask, or None if every token is allowed."""
        return None if self._grammar is None else self._grammar.allowed

    def begin(self) -> CompletionChunk | None:
        """The chunk of a completion that ends before its first token: no token asked for, or a grammar of nothing."""
        if self._grammar is not None and self._grammar.allowed is None:
            return self._finish("", None, None, "stop")
        return None if self._params.max_tokens else self._finish("", None, None, "length")

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> CompletionChunk:
        """The next token, chosen among `allowed_tokens`.

        Raises:
            GrammarError: no token of the vocabulary can follow it.
        """
        self.token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        if token_id in self._eos:
            return self._finish("", token_id, logprobs, "stop")
        if token_id in self._params.stop_token_ids:
            return self._finish("", token_id, logprobs, "stop", token_id)
        text = self._shown(self._detokenizer.push(token_id))
        if self._stops is not None and self._stops.matched is not None:
            return self._finish(text, token_id, logprobs, "stop", self._stops.matched)
        if self._grammar is not None:
            self._grammar.accept(token_id)
            if self._grammar.allowed is None:
                return self._finish(text, token_id, logprobs, "stop")
        if len(self.token_ids) >= self._params.max_tokens:
            return self._finish(text, token_id, logprobs, "length")
        self._pieces.append(text)
        return CompletionChunk(text, token_id, logprobs)

    def cancel(self) -> CompletionChunk:
        """Ends it here."""
        return self._finish("", None, None, "cancelled")

    def _shown(self, text: str) -> str:
        return text if self._stops is None else self._stops.push(text)

    def _finish(
        self,
        text: str,
        token_id: int | None,
        logprobs: TokenLogprobs | None,
        reason: FinishReason,
        stop_reason: str | int | None = None,
    ) -> CompletionChunk:
        if self._stops is None:
            text += self._detokenizer.flush()
        elif self._stops.matched is None:
            text += self._stops.push(self._detokenizer.flush())
            if self._stops.matched is not None:
                reason, stop_reason = "stop", self._stops.matched
            else:
                text += self._stops.finish()
        self._pieces.append(text)
        self.finish_reason, self.stop_reason = reason, stop_reason
        return CompletionChunk(text, token_id, logprobs, reason, stop_reason)

    def output(self, num_prompt_tokens: int, num_cached_tokens: int) -> CompletionOutput:
        """What there is so far."""
        return CompletionOutput(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
        )


_claims_lock = threading.Lock()
_claimed: set[int] = set()  # handles of sessions that a stream is using, between its tokens too


class CompletionStream:
    """A completion that is made as it is read: an iterator over pieces of text, made by `LLM` and `Chat`.

    Nothing is read before the first piece is asked for. A session that the stream made is freed at its end; one that
    was passed in stands after the last token that was read: all but the last of the output's token_ids.
    One thread at a time may read; `cancel` and `output` are for any.

    Attributes:
        prompt_ids: what it reads first.
        read_ids: after the end, the tokens of prompt and answer that the session has read; None if an error ended it.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        prompt_ids: Sequence[int],
        builder: CompletionBuilder,
        params: SamplingParams,
        *,
        owns_session: bool = True,
        num_cached_tokens: int = 0,
        step: Step | None = None,
        on_end: Callable[[CompletionStream], None] | None = None,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.read_ids: list[int] | None = None
        self._open_session = open_session
        self._builder = builder
        self._params = params
        self._owns_session = owns_session
        self._num_cached_tokens = num_cached_tokens
        self._step = step
        self._on_end = on_end  # called before the session is let go
        self._native = params.to_c()
        self._token = ctypes.c_int32()
        self._reading = threading.Lock()
        self._cancelling = threading.RLock()  # a signal handler may cancel in the middle of a cancel
        self._cancelled = False
        self._closed = False
        self._claim: int | None = None
        self._session: Session | None = None
        self._start_position = 0

    @property
    def output(self) -> CompletionOutput:
        """The completion so far; whole if its finish_reason is not None."""
        return self._builder.output(len(self.prompt_ids) + self._num_cached_tokens, self._num_cached_tokens)

    def result(self) -> CompletionOutput:
        """Reads to the end."""
        for _ in self:
            pass
        return self.output

    def cancel(self) -> None:
        """Ends it within one token, or one block of the prompt, with finish_reason "cancelled".

        From any thread, at any time: before the start nothing is read, after the end nothing happens.
        """
        with self._cancelling:
            self._cancelled = True
            if self._session is not None:
                with contextlib.suppress(ClosedError):  # by its owner, in the middle
                    self._session.cancel()

    def close(self) -> None:
        """Cancels it, if it has not ended, and waits for that."""
        self.cancel()
        with self._reading:
            if not self._closed:
                self._builder.cancel()
                self._end(failed=False)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (chunk := self.next_chunk()) is not None:
            if chunk.text:
                return chunk.text
        raise StopIteration

    def chunks(self) -> Iterator[CompletionChunk]:
        """A chunk for each token, with its id and log-probabilities."""
        while (chunk := self.next_chunk()) is not None:
            yield chunk

    def next_chunk(self) -> CompletionChunk | None:
        """The next token's chunk; None after the end.

        Raises:
            BusyError: another thread is reading this stream, or another stream uses its session.
            GrammarError: no token can follow. InvalidArgumentError: the parameters leave no token.
            BackendError, DeadSessionError, ClosedError, OutOfMemoryError: as `Session.prefill`.
        """
        if not self._reading.acquire(blocking=False):
            raise BusyError("stream: another thread is reading it; use one stream a thread")
        try:
            if self._closed:
                return None
            failed = True
            try:
                with contextlib.suppress(CancelledError):
                    chunk = self._advance()
                    failed = False
                    return chunk
                failed = False
                return self._builder.cancel()
            finally:
                if failed or self._builder.finish_reason is not None:
                    self._end(failed)
        finally:
            self._reading.release()

    def _advance(self) -> CompletionChunk:
        if self._cancelled:
            return self._builder.cancel()
        if self._session is None:
            session = self._start()
            if (only := self._builder.begin()) is not None:
                return only
        else:
            session = self._session
            if self._step is None:
                c.call("lococo_session_step", session._open(), self._token)
            else:
                self._step(session, self._token.value)
        mask = self._builder.allowed_tokens
        if mask is not None:
            self._native.allowed_tokens = mask.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
            self._native.num_allowed_words = mask.size
        c.call("lococo_session_sample", session._open(), ctypes.byref(self._native), ctypes.byref(self._token))
        token, top = self._token.value, self._params.logprobs
        return self._builder.push(token, None if top is None else session.logprobs(token, top))

    def _start(self) -> Session:
        session = self._open_session()
        handle = session._open().value or 0
        with _claims_lock:
            if handle in _claimed:
                raise BusyError("session: another stream is using it; use one session a stream")
            _claimed.add(handle)
            self._claim = handle
        with self._cancelling:
            self._session = session
            if self._cancelled:
                session.cancel()
        self._start_position = session.position
        if self.prompt_ids:
            session.prefill(self.prompt_ids)
        return session

    def _end(self, failed: bool) -> None:
        self._closed = True
        with self._cancelling:
            session, self._session = self._session, None
            if session is not None and self._cancelled:
                with contextlib.suppress(ClosedError):
                    session.cancel(False)
        if session is not None and not failed:
            with contextlib.suppress(ClosedError):  # then what it had read is unknown
                num_read = session.position - self._start_position
                self.read_ids = [*self.prompt_ids, *self._builder.token_ids][:num_read]
        try:
            if session is not None and self._on_end is not None:
                self._on_end(self)
        finally:
            if session is not None and self._owns_session:
                session.close()
            with _claims_lock:
                _claimed.discard(self._claim or 0)

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


class AsyncCompletionStream:
    """A `CompletionStream` for asyncio: an async iterator over pieces of text. Each token is made in a worker thread.

    A task that is cancelled while it waits for a piece cancels the completion.
    """

    def __init__(self, stream: CompletionStream, executor: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._executor = executor

    @property
    def output(self) -> CompletionOutput:
        """As `CompletionStream.output`."""
        return self._stream.output

    def cancel(self) -> None:
        """As `CompletionStream.cancel`."""
        self._stream.cancel()

    async def next_chunk(self) -> CompletionChunk | None:
        """As `CompletionStream.next_chunk`. Raises ClosedError once the `LLM` is closed."""
        future = self._submit(self._stream.next_chunk)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._stream.cancel()
            self._submit(self._stream.close)  # waits for the forward that is running
            raise

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._executor.submit(work)
        except RuntimeError as e:  # it was shut down
            self._stream.close()
            raise ClosedError("the LLM is closed; open it again") from e

    async def chunks(self) -> AsyncIterator[CompletionChunk]:
        """As `CompletionStream.chunks`."""
        while (chunk := await self.next_chunk()) is not None:
            yield chunk

    async def result(self) -> CompletionOutput:
        """As `CompletionStream.result`."""
        while await self.next_chunk() is not None:
            pass
        return self.output

    async def aclose(self) -> None:
        """As `CompletionStream.close`."""
        self._stream.cancel()
        await asyncio.wrap_future(self._submit(self._stream.close))

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while (chunk := await self.next_chunk()) is not None:
            if chunk.text:
                return chunk.text
        raise StopAsyncIteration
