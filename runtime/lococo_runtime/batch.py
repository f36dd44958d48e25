"""Sessions stepped together, and any number of prompts continued that way."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from . import _c_api as c
from ._exceptions import ClosedError, InvalidArgumentError, LococoError
from .sampling import SamplingParams, TokenLogprobs, or_default
from .session import Logits, Model, Session, TokenIds, _Handle, check_ids

OnToken = Callable[[int, int], object]
"""Gets a prompt's number and a token of it; true ends that prompt."""


class Batch(_Handle):
    """Sessions that read one token each in one forward, which reads the weights once for all of them.

    Sessions of the model join and leave at any time, at any position, each with its own fusions. While a session is in
    a batch, `logits`, `sample`, `position`, `save`, `state` and `clone` work as ever; what would change it (`prefill`,
    `step`, `generate`, `reset`, `load`) raises BusyError. What a session computes depends neither on its place in the
    batch nor on the others; beside `Session.step` it differs by rounding. A context manager; one thread at a time,
    though others may look at sessions that a step leaves out.

    Backend "tensorrt" has no batched engines: there the same calls run a forward for each session, whose numbers are
    those of `Session.step` to the bit. `implementation` says which.

    Args:
        model: of a bundle exported with `--batch N`.

    Attributes:
        implementation: "graph", one forward for all; or "loop", one for each.

    Raises:
        UnsupportedError: the bundle has no batched graph.
        ClosedError: the model is closed.
    """

    def __init__(self, model: Model) -> None:
        self._handle = ctypes.c_void_p()
        if not model._handle or model._closing:
            raise ClosedError("the model is closed; open it again before making a batch")
        self.model = model
        self._sessions: list[Session] = []
        c.call("lococo_batch_create", model._handle, ctypes.byref(self._handle))
        model._count(+1)
        implementation = ctypes.c_int()
        c.call("lococo_batch_get_implementation", self._handle, ctypes.byref(implementation))
        self.implementation: Literal["graph", "loop"] = "loop" if implementation.value else "graph"

    @property
    def size(self) -> int:
        """Sessions that fit, N of `--batch N`."""
        return self.model.max_batch

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions in it, in the order in which they joined."""
        return tuple(self._sessions)

    def add(self, session: Session) -> None:
        """Lets the session join, at a cost that does not depend on history.

        Raises:
            InvalidArgumentError: `size` sessions are in it, the session is in a batch, or it is of another model.
            BusyError, ClosedError, DeadSessionError.
        """
        c.call("lococo_batch_add", self._open(), session._open())
        session._batch = self
        self._sessions.append(session)

    def remove(self, session: Session) -> None:
        """Lets the session go on alone, with its state. Raises InvalidArgumentError if it is not in this batch."""
        c.call("lococo_batch_remove", self._open(), session._open())
        session._batch = None
        self._sessions.remove(session)

    def step(self, sessions: Sequence[Session], ids: TokenIds) -> Logits:
        """Reads ids[i] in sessions[i]: some or all sessions of the batch, each once; the others rest.

        Everything is checked before any session reads, so that one bad id or session changes none.

        Returns:
            float32 logits after the tokens, (n, V).

        Raises:
            InvalidArgumentError: no session, one that is not in this batch or comes twice, or another number of ids.
            TokenIdError: an id outside the vocabulary.
            BackendError: each session has either read its token or stands where it stood, see `Session.position`; in
                a loop, a session whose forward failed is dead instead.
            BusyError, ClosedError, DeadSessionError.
        """
        self._step(sessions, ids)
        return np.stack([session.logits() for session in sessions])

    def _step(self, sessions: Sequence[Session], ids: TokenIds) -> None:
        array = check_ids(ids, self.model.vocab_size)
        if len(sessions) != array.size:
            raise InvalidArgumentError(f"ids: expected one for each of {len(sessions)} sessions, got {array.size}")
        handles = (ctypes.c_void_p * array.size)(*(session._open() for session in sessions))
        c.call("lococo_batch_step", self._open(), handles, array.ctypes.data_as(c._IDS), array.size)

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ClosedError("the batch is closed; create a new one")
        return self._handle

    def close(self) -> None:
        """Frees the batch; the sessions in it go on alone. Closing twice is fine.

        Raises:
            BusyError: another thread is inside a call; nothing is freed.
        """
        if self._handle:
            for session in self.sessions:
                self.remove(session)
            c.library().lococo_batch_destroy(self._handle)
            self._handle = ctypes.c_void_p()
            self.model._count(-1)


@dataclass
class BatchOutput:
    """What became of one prompt: the tokens generated, and why they ended.

    Attributes:
        token_ids: a token that ended generation is the last of them.
        finish_reason: "stop" at an end-of-sequence or stop token, or because `on_token` said so; "length" at
            max_tokens; "error" where this prompt alone failed, with `error` as the reason.
        logprobs: an entry for every token if its params ask for them.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] = "length"
    error: LococoError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def generate_many(
    model: Model,
    prompts: Sequence[TokenIds],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    on_token: OnToken | None = None,
) -> list[BatchOutput]:
    """Continues any number of prompts, `model.max_batch` at a time; as one ends, the next takes its place.

    Args:
        model: of a bundle exported with `--batch N`.
        prompts: token ids, each at least one.
        params: for all prompts, or one for each; without `stop`, which needs text.
        on_token: called with the prompt's number and each of its tokens as they come; true ends that prompt.

    Returns:
        one output for each prompt, in their order.

    Raises:
        EmptyPromptError, TokenIdError, InvalidArgumentError: a prompt or its params; nothing has been read then.
        UnsupportedError: the bundle has no batched graph.
        BackendError: a step of the whole batch failed.
    """
    arrays = [check_ids(prompt, model.vocab_size, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    each = [*map(or_default, params if isinstance(params, Sequence) else [params] * len(arrays))]
    if len(each) != len(arrays):
        raise InvalidArgumentError(f"params: expected one for each of {len(arrays)} prompts, got {len(each)}")
    if any(p.stop for p in each):
        raise InvalidArgumentError("stop: prompts are token ids and have no text; use stop_token_ids")
    outputs = [BatchOutput() for _ in arrays]
    waiting = deque(i for i in range(len(arrays)) if each[i].max_tokens > 0)
    with contextlib.ExitStack() as stack:
        batch = stack.enter_context(Batch(model))
        free = [stack.enter_context(model.session()) for _ in range(min(batch.size, len(waiting)))]
        running: dict[Session, int] = {}  # the prompt's number
        while waiting or running:
            while waiting and free:
                session, i = free.pop(), waiting.popleft()
                session.reset()
                try:
                    session.prefill(arrays[i])
                except LococoError as e:
                    outputs[i].finish_reason, outputs[i].error = "error", e
                    free.append(session)
                    continue
                batch.add(session)
                running[session] = i
            for session, i in list(running.items()):
                if _next_token_ends(session, outputs[i], each[i], i, on_token):
                    batch.remove(session)
                    del running[session]
                    free.append(session)
            if running:
                batch._step(list(running), [outputs[i].token_ids[-1] for i in running.values()])
    return outputs


def _next_token_ends(
    session: Session, output: BatchOutput, params: SamplingParams, index: int, on_token: OnToken | None
) -> bool:
    """Samples a token of prompt `index`, and says whether it is the last one."""
    try:
        token = session.sample(params)
        if params.logprobs is not None:
            output.logprobs.append(session.logprobs(token, params.logprobs))
    except LococoError as e:
        output.finish_reason, output.error = "error", e
        return True
    output.token_ids.append(token)
    stopped = on_token is not None and bool(on_token(index, token))
    stopped |= token in session._ends(params)
    if stopped:
        output.finish_reason = "stop"
    return stopped or len(output.token_ids) == params.max_tokens
