"""A conversation in one session: each turn reads only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._chat_template import Message
from ._exceptions import BusyError
from .completion import AsyncCompletionStream, CompletionOutput, CompletionStream
from .grammar import Grammar
from .sampling import SamplingParams
from .session import Session

if TYPE_CHECKING:
    from .llm import LLM


class Chat:
    """A conversation whose session is kept between turns. A context manager; one turn at a time.

    A session cannot be rewound. So a turn renders the whole conversation, and where that begins with what the session
    has read, it reads the rest; else it starts over, which `num_cached_tokens` of the output shows: it is 0. Templates
    that change earlier turns (leave out reasoning, strip answers) start over, and so does a conversation whose
    `messages` were edited.

    Args:
        llm: the bundle.
        messages: what was said before, a system message for one; read with the first turn.
        session: to begin behind what this session has read: a document, or another conversation. It becomes the
            chat's, and what it holds now is what starting over goes back to.
        tools, documents, chat_template_kwargs: as `LLM.chat`'s.

    Attributes:
        messages: the conversation, a list of dicts. A turn that fails, or is cancelled before its first character,
            leaves it as it was.
        session: where it stands; save it to go on another time.
    """

    def __init__(
        self,
        llm: LLM,
        messages: Sequence[Message] = (),
        *,
        session: Session | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if session is not None:
            llm.check_session(session)
        self.messages: list[Message] = list(messages)
        self.session = llm.model.session() if session is None else session
        self._llm = llm
        self._tools, self._documents, self._chat_template_kwargs = tools, documents, chat_template_kwargs
        self._base = self.session.state() if self.session.position else None
        self._read: list[int] | None = []  # ids that the session has read since the base; None: unknown
        self._unread: list[int] = []  # the last token of the last answer, or nothing
        self._turns = 0

    def send(
        self, message: str | Message, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> CompletionOutput:
        """Says something, as the user if it is a string, and returns the answer. Both join `messages`.

        Raises:
            see `LLM.chat`.
        """
        return self.stream(message, params, grammar=grammar).result()

    def stream(
        self, message: str | Message, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> CompletionStream:
        """The answer piece by piece; it joins `messages` when the stream has ended or was closed."""
        said: Message = {"role": "user", "content": message} if isinstance(message, str) else message
        return self.answer([*self.messages, said], params, grammar=grammar)

    async def asend(
        self, message: str | Message, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> CompletionOutput:
        """As `send`, without blocking the event loop."""
        return await self.astream(message, params, grammar=grammar).result()

    def astream(
        self, message: str | Message, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> AsyncCompletionStream:
        """As `stream`, for `async for`."""
        return self._llm._async(self.stream(message, params, grammar=grammar))

    def answer(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> CompletionStream:
        """Answers a whole conversation, which becomes `messages`: what a stateless client sends on every turn.

        Raises:
            BusyError: from the stream, if another turn has begun since.
        """
        messages = list(messages)
        text = self._llm.apply_chat_template(
            messages,
            tools=self._tools,
            documents=self._documents,
            chat_template_kwargs=self._chat_template_kwargs,
        )
        ids, num_cached = self._unread_part(text)
        turn = self._turns

        def begin() -> Session:
            if turn != self._turns:
                raise BusyError("chat: another turn has begun since; one turn at a time")
            self._turns += 1
            if self._read is None or num_cached < len(self._read):
                self._start_over()
            return self.session

        return self._llm._stream(
            ids, params, grammar, begin, num_cached_tokens=num_cached, on_end=lambda stream: self._end(messages, stream)
        )

    def _unread_part(self, text: str) -> tuple[list[int], int]:
        """The ids to read of a rendered conversation, and how many the session has read before them: all, or 0."""
        ids = self._llm.encode(text, add_special_tokens=False)
        read = self._read
        if not read:
            return ids, 0
        if ids[: len(read)] == read:
            return ids[len(read) :], len(read)
        # A model may write a text in other tokens than its tokenizer would. The tokens of what follows are the same if
        # that begins with a special token, where a tokenizer always cuts.
        for unread in (self._unread, []):
            known = self._llm.detokenizer.whole_text([*read, *unread])
            if known is not None and text.startswith(known):
                rest = self._llm.encode(text[len(known) :], add_special_tokens=False)
                if rest and rest[0] in self._llm.detokenizer.special_ids:
                    return [*unread, *rest], len(read)
        return ids, 0

    def _start_over(self) -> None:
        if self._base is None:
            self.session.reset()
        else:
            self.session.set_state(self._base)
        self._read, self._unread = [], []

    def _end(self, messages: list[Message], stream: CompletionStream) -> None:
        if self._read is None or stream.read_ids is None:
            self._read = None
            return
        self._read += stream.read_ids
        output = stream.output
        self._unread = [*stream.prompt_ids, *output.token_ids][len(stream.read_ids) :]
        if output.text or output.finish_reason != "cancelled":
            self.messages = [*messages, {"role": "assistant", "content": output.text}]

    def close(self) -> None:
        """Frees the session. Raises BusyError while a turn is under way."""
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
