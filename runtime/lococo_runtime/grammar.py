"""Output held to a JSON schema or a regular expression: which tokens may come next, computed by llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ._exceptions import GrammarError, NotFoundError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from tokenizers import Tokenizer

    from ._detokenizer import Detokenizer

Mask = npt.NDArray[np.uint32]
"""(ceil(vocab_size / 32)): token id is allowed if bit id % 32 of word id // 32 is set."""


@dataclass(frozen=True)
class Grammar:
    """What the generated text must be, as a whole: made by `json_schema` or `regex`, which is its `kind`."""

    kind: Literal["json_schema", "regex"]
    source: str
    """The schema as JSON text, or the pattern."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """A JSON value that is valid under a JSON schema, spaced as json.dumps does: `{"a": 1, "b": [2, 3]}`.

        Args:
            schema: a dict, or its JSON text. `{"type": "object"}` is any object.

        Raises:
            GrammarError: not a JSON schema. Keywords that cannot be enforced are refused when generation starts.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            source = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as e:
            raise GrammarError(f"JSON schema: expected a JSON object: {e}") from e
        if not isinstance(value, dict):
            raise GrammarError(f"JSON schema: expected a JSON object, got {source[:100]}")
        return cls("json_schema", source)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that matches `pattern` as a whole. Rust's syntax: no look-around, no back-references.

        Raises:
            GrammarError: not a string. Patterns that do not compile are refused when generation starts.
        """
        if not isinstance(pattern, str):
            raise GrammarError(f"regex: expected a string, got {type(pattern).__name__}")
        return cls("regex", pattern)


_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


class GrammarCompiler:
    """Grammars for one vocabulary. Making it reads the whole vocabulary: half a second for 50,000 tokens.

    Args:
        tokenizer: of the bundle.
        detokenizer: of the tokenizer.
        vocab_size: rows of the model's logits, which may be more than the tokenizer has tokens.

    Raises:
        NotFoundError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, detokenizer: Detokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as e:
            raise NotFoundError("grammars need the llguidance package: pip install 'lococo-export[grammar]'") from e
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, detokenizer, vocab_size)))

    def start(self, grammar: Grammar, end_token_ids: Iterable[int]) -> GrammarState:
        """The grammar at its beginning.

        Args:
            grammar: from `Grammar.json_schema` or `Grammar.regex`.
            end_token_ids: allowed wherever the text may end.

        Raises:
            GrammarError: it does not compile, uses what cannot be enforced, or nothing satisfies it.
        """
        from llguidance import LLMatcher

        try:
            if grammar.kind == "regex":
                text = LLMatcher.grammar_from_regex(grammar.source)
            else:
                text = LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON_STYLE)
        except ValueError as e:  # nested too deeply, or text that is not Unicode
            raise GrammarError(f"{grammar.kind}: {e}") from e
        return GrammarState(grammar, LLMatcher(self._tokenizer, text, log_level=0), self._vocab_size, end_token_ids)


class _Vocabulary:
    """The vocabulary as llguidance asks for it: bytes of every token, and one token more, which stands for the end.

    The end is not an end-of-sequence token of the model: it may have none, or several, and a call may bring its own.
    """

    def __init__(self, tokenizer: Tokenizer, detokenizer: Detokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*(detokenizer.token_bytes(i) for i in range(vocab_size)), b"<end>"]
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.special_token_ids = [*(i for i in detokenizer.special_ids if i < vocab_size), vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class GrammarState:
    """How far a text has come in its grammar, and what may follow. Made by `GrammarCompiler.start`.

    Attributes:
        allowed: the tokens that may come next, or None if the text is complete and nothing may follow.
    """

    def __init__(self, grammar: Grammar, matcher: LLMatcher, vocab_size: int, end_token_ids: Iterable[int]) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._words = (vocab_size + 31) // 32
        self._end = vocab_size // 32, np.uint32(1 << vocab_size % 32)
        self._mask: Mask = np.zeros(vocab_size // 32 + 1, np.uint32)  # vocab_size + 1 bits
        self._end_token_ids = list(end_token_ids)
        self.allowed: Mask | None = self._next()

    def accept(self, token_id: int) -> None:
        """Appends a token of text, one of `allowed`."""
        if not self._matcher.consume_token(token_id):
            raise self._error()
        self.allowed = self._next()

    def _next(self) -> Mask | None:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            return None
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            raise self._error()
        word, bit = self._end
        if self._mask[word] & bit:
            self._mask[word] &= ~bit
            for i in self._end_token_ids:
                self._mask[i // 32] |= np.uint32(1 << i % 32)
        return self._mask[: self._words] if self._mask.any() else None

    def _error(self) -> GrammarError:
        said = self._matcher.get_error().split("<state>")[0].strip()
        if said.startswith("NoExtension"):
            said = "nothing satisfies it with this vocabulary"
        return GrammarError(f"{self._grammar.kind} {self._grammar.source[:200]!r}: {said[:500]}")
