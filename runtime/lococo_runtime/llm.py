"""Text in, text out: a session and a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ._exceptions import EmptyPromptError, NotFoundError
from .sampling import SamplingParams
from .session import Model, Session

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """What was generated: the text, its token ids, and why it ended ("stop": end of sequence, "length": max_tokens)."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


def load_tokenizer(bundle: str | os.PathLike[str]) -> Tokenizer:
    """The bundle's tokenizer, through the `tokenizers` package.

    Raises:
        NotFoundError: the package is not installed, or the bundle carries no tokenizer.json.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise NotFoundError("text needs the tokenizers package: pip install 'lococo-export[text]'") from e
    path = Path(bundle) / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{path}: not found; this bundle has no tokenizer, pass token ids to Session instead")
    return Tokenizer.from_file(str(path))


class LLM:
    """A bundle that reads and writes text. Prompts are independent of each other. A context manager.

    Args:
        bundle: a bundle directory with tokenizer.json.
        **options: as `Model`.

    Raises:
        see `Model` and `load_tokenizer`.
    """

    def __init__(self, bundle: str | os.PathLike[str], **options: Any) -> None:
        self.tokenizer = load_tokenizer(bundle)
        self.model = Model(bundle, **options)
        self.session = Session(self.model)

    def generate(self, prompt: str, params: SamplingParams | None = None) -> CompletionOutput:
        """Completes a prompt.

        Raises:
            EmptyPromptError: an empty prompt.
            InvalidArgumentError: parameters out of range.
        """
        ids = list(self._tokens(prompt, params))
        stopped = bool(ids) and ids[-1] in self._stops(params)
        text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        return CompletionOutput(text, ids, "stop" if stopped else "length")

    def generate_stream(self, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
        """Completes a prompt piece by piece; a piece never ends inside a character. Raises as `generate`."""
        return stream_text(self.tokenizer, self._tokens(prompt, params))

    def _tokens(self, prompt: str, params: SamplingParams | None) -> Iterator[int]:
        ids = self.tokenizer.encode(prompt).ids
        if not ids:
            raise EmptyPromptError("prompt: expected some text, got an empty one")
        self.session.reset()
        return self.session.generate(ids, params)

    def _stops(self, params: SamplingParams | None) -> Sequence[int]:
        return () if params and params.ignore_eos else self.model.manifest.model.eos_token_ids

    def close(self) -> None:
        """Frees the session and the weights."""
        self.session.close()
        self.model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Token ids to pieces of text as soon as they are whole characters; special tokens are left out."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for token in ids:
        if piece := decoder.step(tokenizer, token):
            yield piece
