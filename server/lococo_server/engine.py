"""Requests to sessions: a fixed number run, a bounded number wait, and all end when their client or their time does."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from lococo_runtime import (
    LLM,
    AsyncCompletionStream,
    Batch,
    CompletionChunk,
    CompletionOutput,
    CompletionStream,
    Grammar,
    InvalidArgumentError,
    SamplingParams,
    Session,
)
from starlette.types import Receive

from .batching import SharedSteps
from .errors import ApiError, ClientGoneError
from .metrics import Metrics
from .snapshots import Origin, Pack, Snapshots

log = logging.getLogger("lococo_server")

_SESSIONS = 8
_KEEP_IN_MEMORY, _KEEP_ON_DISK = 16, 256

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        sessions: requests that run at once; each has a session of its own. None: as many as the bundle steps together,
            or 8.
        batch: steps them together if the bundle can (`lococo-export --batch`). An answer never depends on who else is
            there, but one alone takes as long as all of them.
        queue: requests that wait for one of them; beyond, 429.
        keep: states that are kept for a conversation's next turn; 0 keeps none. None: 256 on disk, 16 in memory.
        connections: at once; beyond, 503.
        body_bytes: of a request; beyond, 413.
        head_seconds: for a request's headers to arrive; beyond, 408.
        body_seconds: for a body to arrive; beyond, 408.
        prompt_tokens: of a request; beyond, 400.
        new_tokens: of an answer, and the default of a chat; asking for more is a 400.
        seconds: for a request from its first byte to its last, waiting included; beyond, 504.

    Raises:
        InvalidArgumentError: a value out of range.
    """

    sessions: int | None = None
    batch: bool = True
    queue: int = 256
    keep: int | None = None
    connections: int = 1000
    body_bytes: int = 1 << 20
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    prompt_tokens: int = 1 << 17
    new_tokens: int = 4096
    seconds: float = 600.0

    def __post_init__(self) -> None:
        lows = {"sessions": 1, "queue": 0, "keep": 0, "connections": 1, "body_bytes": 1, "prompt_tokens": 1}
        for name, low in lows.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise InvalidArgumentError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("new_tokens", "head_seconds", "body_seconds", "seconds"):
            if not 0 < getattr(self, name) < 2**31:
                raise InvalidArgumentError(f"{name}: expected more than 0, got {getattr(self, name)}")


class Lifetime:
    """A request's: it is over when the client has gone or the time is up.

    Args:
        receive: the request's, its body read; the next message is that the client has gone.
        seconds: from now on.
        on_close: called with this when the request has ended.
    """

    def __init__(self, receive: Receive, seconds: float, on_close: Callable[[Lifetime], object]) -> None:
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self.reason: ApiError | ClientGoneError | None = None
        late = ApiError(
            504,
            f"the request took more than {seconds:g} s; ask for fewer tokens",
            code="timeout",
            headers={"x-should-retry": "false"},  # OpenAI's word to its clients: it would take as long again
        )
        self._deadline = self.began + seconds
        self._timer = self._loop.call_at(self._deadline, self.end, late)
        self._watch = asyncio.create_task(self._wait_for_disconnect(receive))

    async def wait(self, awaited: asyncio.Future[T]) -> T:
        """The result of a future, or `reason` raised."""
        futures: set[asyncio.Future[Any]] = {awaited, self._over}
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done() and self.reason is not None:
            raise self.reason
        return awaited.result()

    def when_over(self, call: Callable[[], object]) -> None:
        """Calls it once, when the request is over before it has ended."""
        self._over.add_done_callback(lambda future: None if future.cancelled() else call())

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return max(0.0, self._deadline - self._loop.time())

    def close(self) -> None:
        """The request has ended."""
        self._on_close(self)
        self._timer.cancel()
        self._watch.cancel()
        self._over.cancel()

    def end(self, reason: ApiError | ClientGoneError) -> None:
        """Nobody waits for an answer any more."""
        if not self._over.done():
            self.reason = reason
            self._over.set_result(None)

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(ClientGoneError())


@dataclass
class Work:
    """What a request asks for.

    text: of the prompt, special tokens written out, if the conversation may continue; None keeps nothing.
    pack: what the prompt is read behind.
    output: what has been made of it so far.
    """

    ids: list[int]
    params: SamplingParams
    grammar: Grammar | None = None
    text: str | None = None
    pack: Pack | None = None
    output: CompletionOutput | None = None


class Engine:
    """Sessions of one bundle, and who has them. To be used in one event loop.

    Args:
        llm: the bundle; closed with the engine.
        limits: sessions, batch, queue, keep.
        state_dir: where kept conversations are written; None keeps them in memory.
        metrics: counts what happens.

    Raises:
        InvalidArgumentError: more sessions than the bundle steps together.
        see `SessionPool`.
    """

    def __init__(
        self, llm: LLM, limits: Limits, *, state_dir: str | os.PathLike[str] | None = None, metrics: Metrics
    ) -> None:
        self.llm, self.limits, self.metrics = llm, limits, metrics
        batch = _batch(llm) if limits.batch else None
        self.num_sessions = limits.sessions or (_SESSIONS if batch is None else batch.size)
        if batch is not None and self.num_sessions > batch.size:
            batch.close()
            raise InvalidArgumentError(
                f"sessions: expected at most {batch.size}, which the bundle steps together, got {self.num_sessions}; "
                "export it with a larger --batch, or serve with --no-batch"
            )
        self._snapshots = None
        keep = limits.keep if limits.keep is not None else _KEEP_IN_MEMORY if state_dir is None else _KEEP_ON_DISK
        if keep:
            self._snapshots = Snapshots(
                llm, keep=keep, directory=state_dir, in_memory=self.num_sessions, metrics=metrics
            )
        self._free = [llm.model.session() for _ in range(self.num_sessions)]
        self._steps = None if batch is None else SharedSteps(batch, metrics)
        self._waiting: deque[asyncio.Future[Session]] = deque()
        self._executor = ThreadPoolExecutor(self.num_sessions + 2, thread_name_prefix="lococo-serve")
        self._mean_seconds = 1.0  # of a request, moving
        self._lives: set[Lifetime] = set()
        self._all_free = asyncio.Event()
        metrics.state_bytes.set(llm.model.state_bytes)

    def begin(self, receive: Receive) -> Lifetime:
        """Of a request whose body has been read; close it."""
        life = Lifetime(receive, self.limits.seconds, self._lives.discard)
        self._lives.add(life)
        return life

    def end_all(self) -> None:
        """Answers everybody who still waits with an error: there is no time left."""
        for life in list(self._lives):
            life.end(ApiError(503, "the server is shutting down", code="shutting_down"))

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in one of the engine's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def chunks(self, works: Sequence[Work], life: Lifetime) -> AsyncGenerator[tuple[int, CompletionChunk], None]:
        """A chunk for every token, with the number of its work. Close it, or read it to its end. Raises as `_chunks`.

        Each work waits for a session of its own, as many as there are sessions at a time; another takes the place of
        one that has ended. An error of one ends all.
        """
        streams = [self._chunks(work, life, follows=i >= self.num_sessions) for i, work in enumerate(works)]
        if len(streams) == 1:
            try:
                async for chunk in streams[0]:
                    yield 0, chunk
            finally:
                await streams[0].aclose()
            return
        later = iter(range(len(streams)))
        waiting: dict[asyncio.Future[CompletionChunk | None], int] = {}

        def read(i: int) -> None:
            waiting[asyncio.ensure_future(anext(streams[i], None))] = i

        for i in itertools.islice(later, self.num_sessions):
            read(i)
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    chunk_or_none = future.result()
                    i = waiting.pop(future)
                    if chunk_or_none is not None:
                        yield i, chunk_or_none
                        read(i)
                    elif (next_or_none := next(later, None)) is not None:
                        read(next_or_none)
        except BaseException as e:
            life.end(e if isinstance(e, ApiError) else ClientGoneError())
            raise
        finally:
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    async def _chunks(self, work: Work, life: Lifetime, *, follows: bool) -> AsyncGenerator[CompletionChunk, None]:
        """A chunk for every token of one work, which waits for its turn even if the queue is full if it `follows`.

        Raises:
            ApiError: the queue is full (429), the time is up (504).
            ClientGoneError: nobody waits for it any more; it has stopped.
        """
        loop = asyncio.get_running_loop()
        session = await self._acquire(life, follows)
        began = loop.time()
        self.metrics.queue_seconds.observe(began - life.began)
        self.metrics.running.inc()
        try:
            stream, origin = await self.call(self._begin, session, work)
            chunks = AsyncCompletionStream(stream, self._executor)
            life.when_over(stream.cancel)
            last = 0.0
            try:
                while (chunk := await chunks.next_chunk()) is not None:
                    if chunk.finish_reason == "cancelled":
                        raise life.reason or ClientGoneError()
                    now = loop.time()
                    if last:
                        self.metrics.token_seconds.observe(now - last)
                    else:
                        self.metrics.first_token_seconds.observe(now - life.began)
                    last = now
                    if chunk.finish_reason is not None:  # kept before the client can ask for the next turn
                        await self.call(self._keep, session, stream, origin)
                    work.output = stream.output if chunk.finish_reason is not None else None
                    yield chunk
            finally:
                await chunks.aclose()
                if self._steps is not None:
                    await self.call(self._steps.leave, session)
                self._count(stream)
        except ClientGoneError:
            self.metrics.cancelled.inc()
            raise
        finally:
            self.metrics.running.dec()
            self._mean_seconds += (loop.time() - began - self._mean_seconds) / 8
            self._release(session)

    def _begin(self, session: Session, work: Work) -> tuple[CompletionStream, Origin | None]:
        ids, origin = work.ids, None
        if work.text is not None and self._snapshots is not None:
            origin = self._snapshots.load(session, ids, work.text, work.pack)
            if origin is not None:
                ids = origin.rest
            else:
                _start(session, work.pack)
                origin = Origin(work.pack, [], b"", ids)
        else:
            _start(session, work.pack)
        step = None if self._steps is None else self._steps.step
        return self.llm.generate_stream(ids, work.params, grammar=work.grammar, session=session, step=step), origin

    def _keep(self, session: Session, stream: CompletionStream, origin: Origin | None) -> None:
        if self._snapshots is not None and origin is not None and stream.read_ids is not None:
            self._snapshots.save(session, origin, stream.read_ids)

    def _count(self, stream: CompletionStream) -> None:
        output = stream.output
        self.metrics.prompt_tokens.inc(output.num_prompt_tokens)
        self.metrics.cached_tokens.inc(output.num_cached_tokens)
        self.metrics.generated_tokens.inc(len(output.token_ids))

    async def _acquire(self, life: Lifetime, follows: bool) -> Session:
        if self._free:
            return self._free.pop()
        if len(self._waiting) >= self.limits.queue and not follows:
            seconds = math.ceil(self._mean_seconds * (len(self._waiting) + 1) / self.num_sessions)
            raise ApiError(
                429,
                f"{len(self._waiting)} requests are waiting already; try again later",
                code="queue_full",
                headers={"Retry-After": str(max(1, seconds))},
            )
        waiter: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self.metrics.waiting.set(len(self._waiting))
        try:
            return await life.wait(waiter)
        except BaseException:
            if waiter.done():
                self._release(waiter.result())
            else:
                self._waiting.remove(waiter)
            raise
        finally:
            self.metrics.waiting.set(len(self._waiting))

    def _release(self, session: Session) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(session)
        else:
            self._free.append(session)
            self._all_free.set()

    async def close(self) -> None:
        """Ends what is running, writes kept conversations and frees everything."""
        self.end_all()
        while len(self._free) < self.num_sessions:
            self._all_free.clear()
            await self._all_free.wait()
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
        if self._snapshots is not None:
            self._snapshots.close()
        if self._steps is not None:
            self._steps.close()
        for session in self._free:
            session.close()
        self.llm.close()


def _start(session: Session, pack: Pack | None) -> None:
    if pack is None:
        session.reset()
    else:
        session.set_state(pack.state)


def _batch(llm: LLM) -> Batch | None:
    """A batch where it saves time: not where it would be a loop."""
    if llm.model.max_batch == 1:
        return None
    batch = Batch(llm.model)
    if batch.implementation == "graph":
        return batch
    batch.close()
    return None
