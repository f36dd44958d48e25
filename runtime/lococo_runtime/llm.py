"""Text in, text out: sessions, a tokenizer, a chat template."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ._chat_template import ChatTemplate, Message
from ._detokenizer import Detokenizer
from ._exceptions import CorruptError, EmptyPromptError, InvalidArgumentError, NotFoundError, TokenIdError
from .bundle import read_manifest
from .completion import AsyncCompletionStream, CompletionBuilder, CompletionOutput, CompletionStream, Step
from .grammar import Grammar, GrammarCompiler
from .sampling import SamplingParams, or_default
from .session import Model, Session, check_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompt = str | Sequence[int]
Json = Mapping[str, Any]


def load_tokenizer(bundle: str | os.PathLike[str]) -> Tokenizer:
    """The bundle's tokenizer, through the `tokenizers` package.

    Raises:
        NotFoundError: the package is not installed, or the bundle carries no tokenizer.json.
        CorruptError: tokenizer.json is malformed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise NotFoundError("text needs the tokenizers package: pip install 'lococo-export[text]'") from e
    path = Path(bundle) / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{path}: not found; this bundle has no tokenizer, pass token ids to Session instead")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing narrower
        raise CorruptError(f"{path}: not a tokenizer: {e}") from e
    tokenizer.no_truncation()  # settings of training, which would cut long prompts
    tokenizer.no_padding()
    return tokenizer


class LLM:
    """A bundle that reads and writes text. Any thread may use it; a context manager.

    Every call has a session of its own, or the one that is passed in, and calls run side by side. In all of them:

    - `params` says how tokens are chosen and when to stop; the default is greedy, 128 tokens.
    - `grammar` holds the whole text to a JSON schema or a regex.
    - `session` is continued from where it stands: the prompt is read behind what it has read before. It is the
      caller's, and stands behind all but the last of the token_ids afterwards. A session has one user at a time.
    - Tool and document lists, and `chat_template_kwargs` such as `{"enable_thinking": False}`, go to the template.

    Args:
        bundle: a bundle directory with tokenizer.json.
        **options: as `Model`.

    Attributes:
        model: the opened bundle.
        tokenizer: a `tokenizers.Tokenizer`.
        detokenizer: makes text of token ids.
        chat_template: makes text of conversations.

    Raises:
        see `Model` and `load_tokenizer`. UnsupportedError: a tokenizer whose text cannot be streamed.
    """

    def __init__(self, bundle: str | os.PathLike[str], **options: Any) -> None:
        read_manifest(bundle)  # where the path is wrong, that is what to say
        self.tokenizer = load_tokenizer(bundle)
        self.detokenizer = Detokenizer(self.tokenizer)
        self.chat_template = ChatTemplate.from_bundle(Path(bundle))
        self.model = Model(bundle, **options)
        self._executor = ThreadPoolExecutor(thread_name_prefix="lococo")  # threads start when async calls need them

    # --- completing a prompt -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> CompletionOutput:
        """Completes a prompt: text, or token ids.

        Raises:
            EmptyPromptError: an empty prompt, and no session that has read something.
            TokenIdError: an id outside the vocabulary. InvalidArgumentError: parameters out of range.
            GrammarError: see `Grammar`. BusyError: the session has another user.
        """
        return self.generate_stream(prompt, params, grammar=grammar, session=session).result()

    def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        session: Session | None = None,
        step: Step | None = None,
    ) -> CompletionStream:
        """Completes a prompt piece by piece; a piece never ends inside a character. Raises as `generate`, at once.

        `step(session, token_id)` reads the answer's tokens in place of `Session.step`, so that several completions may
        share forwards: see `Batch`.
        """
        fresh = session is None or session.position == 0
        ids = self.encode(prompt, add_special_tokens=fresh) if isinstance(prompt, str) else prompt
        return self._continue(ids, params, grammar, session, step)

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> CompletionOutput:
        """As `generate`, without blocking the event loop. Cancelling the task cancels the completion."""
        return await self.agenerate_stream(prompt, params, grammar=grammar, session=session).result()

    def agenerate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> AsyncCompletionStream:
        """As `generate_stream`, for `async for`."""
        return self._async(self.generate_stream(prompt, params, grammar=grammar, session=session))

    # --- answering messages ------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        chat_template_kwargs: Json | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> CompletionOutput:
        """The assistant's answer to `messages`, [{"role": "user", "content": "..."}, ...], read from the first one on.

        `Chat` keeps a session between turns instead.

        Raises:
            ChatTemplateError: the bundle has no chat template, or it refuses these messages.
            InvalidArgumentError: messages that are none. And as `generate`.
        """
        return self.chat_stream(
            messages,
            params,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
            grammar=grammar,
            session=session,
        ).result()

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        chat_template_kwargs: Json | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> CompletionStream:
        """The answer piece by piece. Raises as `chat`, at once."""
        text = self.apply_chat_template(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
        )
        ids = self.encode(text, add_special_tokens=False)
        return self._continue(ids, params, grammar, session)

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        chat_template_kwargs: Json | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> CompletionOutput:
        """As `chat`, without blocking the event loop. Cancelling the task cancels the completion."""
        return await self.achat_stream(
            messages,
            params,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
            grammar=grammar,
            session=session,
        ).result()

    def achat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        chat_template_kwargs: Json | None = None,
        grammar: Grammar | None = None,
        session: Session | None = None,
    ) -> AsyncCompletionStream:
        """As `chat_stream`, for `async for`."""
        return self._async(
            self.chat_stream(
                messages,
                params,
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
                grammar=grammar,
                session=session,
            )
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, prompt: Prompt, session: Session, *, progress: Callable[[int, int], None] | None = None) -> int:
        """Reads a text, or token ids, into `session`, behind what it has read before, and writes nothing.

        It reads block by block: between two of them Ctrl-C is heard, and what was read until then stays read.

        Args:
            prompt: text or token ids.
            session: of this model; see above.
            progress: called after every block with the tokens read and those of the prompt.

        Returns:
            the tokens of the prompt.

        Raises:
            EmptyPromptError: an empty prompt. TokenIdError: an id outside the vocabulary; nothing has been read then.
            CancelledError: `Session.cancel`. BusyError, ClosedError, DeadSessionError, BackendError.
        """
        self.check_session(session)
        ids = self.encode(prompt, add_special_tokens=session.position == 0) if isinstance(prompt, str) else prompt
        array = check_ids(ids, self.model.vocab_size, "prompt")  # (T)
        block = self.model.manifest.cache.block_size
        for first in range(0, array.size, block):
            session.prefill(array[first : first + block])
            if progress is not None:
                progress(min(first + block, array.size), array.size)
        return array.size

    # --- the parts ---------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        chat_template_kwargs: Json | None = None,
    ) -> str:
        """The text that `chat` reads: special tokens are in it, so encode it with add_special_tokens=False."""
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=chat_template_kwargs,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it become those tokens.

        Raises:
            InvalidArgumentError: not a string, or one that is no Unicode text (lone surrogates).
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text: expected a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidArgumentError(f"text: expected Unicode text: {e}") from e
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def builder(self, params: SamplingParams, grammar: Grammar | None = None) -> CompletionBuilder:
        """What makes text of tokens, for a caller who steps sessions itself.

        Raises:
            TokenIdError: an id of stop_token_ids or logit_bias outside the vocabulary.
            GrammarError: see `Grammar`.
        """
        eos = self.model.manifest.model.eos_token_ids
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in ids:
                if token_id >= self.model.vocab_size:
                    raise TokenIdError(f"{name}: expected ids below {self.model.vocab_size}, got {token_id}")
        if params.logprobs is not None and params.logprobs > self.model.vocab_size:
            raise InvalidArgumentError(f"logprobs: expected at most {self.model.vocab_size}, got {params.logprobs}")
        state = None
        if grammar is not None:
            ends: Iterable[int] = params.stop_token_ids if params.ignore_eos else (*eos, *params.stop_token_ids)
            state = self._grammars.start(grammar, ends)
        return CompletionBuilder(self.detokenizer, params, eos, state)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.detokenizer, self.model.vocab_size)

    def check_session(self, session: Session) -> None:
        """Raises InvalidArgumentError unless it is a session of this bundle, where token ids mean the same."""
        if not isinstance(session, Session):
            raise InvalidArgumentError(f"session: expected Session, got {type(session).__name__}")
        if session.model is not self.model and session.model.manifest.bundle_id != self.model.manifest.bundle_id:
            raise InvalidArgumentError("session: expected one of this bundle, got one of another")

    def _continue(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        grammar: Grammar | None,
        session: Session | None,
        step: Step | None = None,
    ) -> CompletionStream:
        if session is None:
            return self._stream(ids, params, grammar, self.model.session, owns_session=True, step=step)
        self.check_session(session)
        given = session
        return self._stream(ids, params, grammar, lambda: given, num_cached_tokens=session.position, step=step)

    def _stream(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        grammar: Grammar | None,
        open_session: Callable[[], Session],
        *,
        owns_session: bool = False,
        num_cached_tokens: int = 0,
        step: Step | None = None,
        on_end: Callable[[CompletionStream], None] | None = None,
    ) -> CompletionStream:
        params = or_default(params)
        if not isinstance(grammar, Grammar | None):
            raise InvalidArgumentError(f"grammar: expected Grammar, got {type(grammar).__name__}")
        if np.size(ids):
            ids = check_ids(ids, self.model.vocab_size).tolist()
        elif num_cached_tokens == 0:
            raise EmptyPromptError("prompt: expected some text, got an empty one")
        return CompletionStream(
            open_session,
            ids,
            self.builder(params, grammar),
            params,
            owns_session=owns_session,
            num_cached_tokens=num_cached_tokens,
            step=step,
            on_end=on_end,
        )

    def _async(self, stream: CompletionStream) -> AsyncCompletionStream:
        return AsyncCompletionStream(stream, self._executor)

    def close(self) -> None:
        """Frees the weights, once the streams that are being read have ended."""
        self._executor.shutdown(wait=False)
        self.model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Token ids to pieces of text as soon as they are whole characters; special tokens are left out."""
    stream = Detokenizer(tokenizer).stream()
    for token in ids:
        if piece := stream.push(token):
            yield piece
    if piece := stream.flush():
        yield piece
