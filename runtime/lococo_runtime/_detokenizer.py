"""Token ids to text while they arrive: every piece is whole characters, and the pieces add up to the decoded whole.

tokenizers' own `decode`, special tokens left out, is the truth. It looks at all ids at once; here each token is looked
at once, so that a stream of any length costs the same per token. What must be held back depends on the decoder:

- ByteLevel (GPT-2 and most models since): tokens are bytes; an unfinished character is held, three bytes at most.
- Sequences as converted from SentencePiece (Llama 2, Gemma): words, and single bytes as <0xNN>. A run of such bytes is
  one string or, if the whole run is not UTF-8, one U+FFFD for each byte: a run is held until it ends.
- Decoders that treat every token but the first alike, one at a time (Metaspace, WordPiece, none): nothing is held.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from ._exceptions import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "x"  # a token that comes before, for decoders that treat the first token differently


class TextStream(Protocol):
    """One sequence of tokens on its way to text."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes, "" if none."""

    def flush(self) -> str:
        """What was held back for tokens that never came; the stream is over then."""


class Detokenizer:
    """Makes streams for a tokenizer; they share what is known about each token.

    Raises:
        UnsupportedError: a decoder of another kind than the three above.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        spec: dict[str, Any] | None = json.loads(tokenizer.to_str())["decoder"]
        steps: list[dict[str, Any]] = [] if spec is None else spec.get("decoders", [spec])
        kinds = [s["type"] for s in steps]
        self._pieces: _Pieces
        if kinds == ["ByteLevel"]:
            self._pieces = _BytePieces(self)
        elif (words := _WordPieces.from_steps(self, steps)) is not None:
            self._pieces = words
        elif len(kinds) <= 1 and set(kinds) <= {"Metaspace", "WordPiece"}:
            self._pieces = _SinglePieces(self, tokenizer.decoder)
        else:
            raise UnsupportedError(
                "tokenizer.json: decoder: expected ByteLevel, Metaspace, WordPiece, none, or a sequence of Replace, "
                f"ByteFallback, Fuse and Strip; got {json.dumps(spec)[:300]}"
            )

    def stream(self) -> TextStream:
        """A new stream, at the beginning of a text."""
        return self._pieces.stream()

    @property
    def special_ids(self) -> Collection[int]:
        """Ids that decode leaves out."""
        return self._special.keys()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, as bytes, the content of special tokens included; b"" for an unknown id."""
        if token_id in self._special:
            return self._special[token_id].encode()
        return self._pieces.token_bytes(token_id)

    def whole_text(self, token_ids: Iterable[int]) -> str | None:
        """What a text must be to have these tokens in its middle, special tokens included; None within a character."""
        try:
            return b"".join(map(self.token_bytes, token_ids)).decode()
        except UnicodeDecodeError:
            return None

    def token(self, token_id: int) -> str:
        """The vocabulary entry; "" where `decode` skips the id: special tokens, and ids outside the vocabulary."""
        return "" if token_id in self._special else self._tokenizer.id_to_token(token_id) or ""


class _Pieces(Protocol):
    def stream(self) -> TextStream: ...

    def token_bytes(self, token_id: int) -> bytes: ...


# --- ByteLevel -------------------------------------------------------------------------------------------------------


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself where that prints, else U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class _BytePieces:
    def __init__(self, owner: Detokenizer) -> None:
        self._owner = owner
        self._table: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        if (found := self._table.get(token_id)) is None:
            token = self._owner.token(token_id)
            try:
                found = bytes([_ALPHABET[c] for c in token])
            except KeyError:  # an added token is written as it is, if any of its characters stands for no byte
                found = token.encode()
            self._table[token_id] = found
        return found

    def stream(self) -> TextStream:
        return _ByteStream(self)


class _ByteStream:
    def __init__(self, pieces: _BytePieces) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._pieces.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


# --- words and single bytes ------------------------------------------------------------------------------------------


class _WordPieces:
    def __init__(
        self, owner: Detokenizer, replacements: list[tuple[str, str]], byte_fallback: bool, strip: tuple[str, int]
    ) -> None:
        self._owner = owner
        self._replacements = replacements
        self._byte_fallback = byte_fallback
        self.strip = strip  # (character, how many of it are dropped at the beginning of the text)
        self._table: dict[int, str | int] = {}

    @classmethod
    def from_steps(cls, owner: Detokenizer, steps: list[dict[str, Any]]) -> _WordPieces | None:
        """[Replace ...] [ByteFallback] Fuse [Strip], or None if it is another sequence."""
        rest = list(steps)
        replacements: list[tuple[str, str]] = []
        while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
            step = rest.pop(0)
            replacements.append((step["pattern"]["String"], step["content"]))
        byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
        if byte_fallback:
            rest.pop(0)
        if not rest or rest.pop(0)["type"] != "Fuse":
            return None
        strip = ("", 0)
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            step = rest.pop(0)
            strip = (step["content"], step["start"])
        return None if rest else cls(owner, replacements, byte_fallback, strip)

    def piece(self, token_id: int) -> str | int:
        """Text, or the value of a byte."""
        if (found := self._table.get(token_id)) is None:
            found = self._owner.token(token_id)
            for old, new in self._replacements:
                found = found.replace(old, new)
            if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(found)):
                found = int(match[1], 16)
            self._table[token_id] = found
        return found

    def known(self, token_id: int) -> bool:
        return self._owner.token(token_id) != ""

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        return piece.encode() if isinstance(piece, str) else bytes([piece])

    def stream(self) -> TextStream:
        return _WordStream(self)


class _WordStream:
    def __init__(self, pieces: _WordPieces) -> None:
        self._pieces = pieces
        self._strip, self._left_to_strip = pieces.strip
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        piece = self._pieces.piece(token_id)
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if not self._pieces.known(token_id):  # skipped by decode: it does not end a run
            return ""
        return self._begin(self._end_run() + piece)

    def flush(self) -> str:
        return self._begin(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _begin(self, text: str) -> str:
        while self._left_to_strip and text:
            if text[0] != self._strip:
                self._left_to_strip = 0
            else:
                text, self._left_to_strip = text[1:], self._left_to_strip - 1
        return text


# --- one token at a time ---------------------------------------------------------------------------------------------


class _SinglePieces:
    def __init__(self, owner: Detokenizer, decoder: Any) -> None:
        self._owner = owner
        self._decode = " ".join if decoder is None else decoder.decode
        self._table: dict[int, tuple[str, str]] = {}

    def piece(self, token_id: int, first: bool) -> str:
        if token_id not in self._table:
            token = self._owner.token(token_id)
            later = self._decode([_ANCHOR, token])[len(self._decode([_ANCHOR])) :]
            self._table[token_id] = (self._decode([token]), later) if token else ("", "")
        return self._table[token_id][0 if first else 1]

    def token_bytes(self, token_id: int) -> bytes:
        return self.piece(token_id, first=False).encode()

    def stream(self) -> TextStream:
        return _SingleStream(self, self._owner)


class _SingleStream:
    def __init__(self, pieces: _SinglePieces, owner: Detokenizer) -> None:
        self._pieces = pieces
        self._owner = owner
        self._first = True

    def push(self, token_id: int) -> str:
        if not self._owner.token(token_id):
            return ""
        text = self._pieces.piece(token_id, self._first)
        self._first = False
        return text

    def flush(self) -> str:
        return ""
