"""Conversations that may continue: the state after each answer, found again by what it has read."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from lococo_runtime import (
    LLM,
    CorruptError,
    LococoError,
    Model,
    Session,
    SessionPool,
    StateMismatchError,
    VersionError,
)

from .metrics import Metrics

log = logging.getLogger("lococo_server")

_NAME = re.compile(r"(\d+)-([0-9a-f]{32})-(\d+)-([0-9a-f]{32})")
_UNKNOWN = "0" * 32


@dataclass(frozen=True)
class Pack:
    """A state that conversations begin with.

    Attributes:
        state: as `Session.state`.
        position: tokens read in it.
        key: of what it is, whatever its name.
    """

    state: bytes
    position: int
    key: bytes

    @classmethod
    def load(cls, model: Model, path: str | os.PathLike[str]) -> Pack:
        """From a state file. Raises as `Session.load`."""
        with model.session() as session:
            session.load(path)
            state = session.state()
            return cls(state, session.position, hashlib.sha256(state).digest())


@dataclass(frozen=True)
class Origin:
    """Where a session stands before it reads a prompt: what is known of the text in it, behind a pack if there is one.

    pack: what it began with.
    token_ids: read so far; None where only their text is known.
    text: the same as UTF-8, special tokens written out; None within a character.
    rest: the ids still to be read of the prompt.
    """

    pack: Pack | None
    token_ids: list[int] | None
    text: bytes | None
    rest: list[int]


@dataclass
class _Use:
    """Of a state: who is there, or waits for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: int = 0


class Snapshots:
    """States in a `SessionPool`, each under hashes of its tokens and of their text.

    The text is a key too because a model may write it in other tokens than its tokenizer would. A state is copied when
    it is used, so several requests can go on from the same one. Any thread may call.

    Args:
        llm: the bundle.
        keep: states; the least recently used ones beyond are forgotten.
        directory: where every state is written, and found again by another process; None keeps them in memory.
        in_memory: with a directory, how many of them stay in memory too.
        metrics: counts them.
    """

    def __init__(
        self, llm: LLM, *, keep: int, directory: str | os.PathLike[str] | None, in_memory: int, metrics: Metrics
    ) -> None:
        self._llm, self._keep, self._metrics = llm, keep, metrics
        self._salt = llm.model.manifest.bundle_id.encode()
        self._alone = threading.Lock()
        self._lock = threading.Lock()  # of `_used`, and of forgetting
        self._used: dict[str, _Use] = {}  # by name; these are not forgotten
        self._temporary = None
        if directory is None:  # a pool needs one; it stays empty, as all that is kept fits in memory
            self._temporary = tempfile.TemporaryDirectory(prefix="lococo-serve-")
            directory, in_memory = self._temporary.name, keep + 1
        self._pool = SessionPool(llm.model, directory, max_sessions=in_memory)
        self._forget_beyond_limit()

    def load(self, session: Session, ids: list[int], text: str, pack: Pack | None) -> Origin | None:
        """Puts the longest state that a prompt continues into a session; None, and nothing done, if there is none.

        Args:
            session: any.
            ids: of the prompt.
            text: of the prompt, special tokens written out.
            pack: what the prompt is read behind.
        """
        data = text.encode()
        for name in sorted(self._pool.sessions(), key=_num_tokens, reverse=True):
            origin = self._origin(name, ids, data, pack)
            if origin is not None and self._copy(name, session):
                return origin
        return None

    def save(self, session: Session, origin: Origin, read_ids: Sequence[int]) -> None:
        """Keeps the state of a session that has read `read_ids` behind `origin`."""
        read = self._llm.detokenizer.whole_text(read_ids)
        text = None if read is None or origin.text is None else origin.text + read.encode()
        token_hash = (
            _UNKNOWN if origin.token_ids is None else self._hash(_bytes([*origin.token_ids, *read_ids]), origin.pack)
        )
        text_hash = _UNKNOWN if text is None else self._hash(text, origin.pack)
        name = f"{session.position}-{token_hash}-{len(text or b'')}-{text_hash}"
        try:
            state = session.state()
            with self._use(name):
                with self._pool.acquire(name, timeout=None) as kept:
                    kept.set_state(state)
                if self._temporary is None:
                    self._pool.flush(name)
        except LococoError as e:  # the answer is good all the same, and the next turn reads everything
            self._metrics.snapshot_errors.inc()
            log.warning("a conversation was not kept: %s", e)

    def close(self) -> None:
        """Writes what is not written yet, if there is a directory."""
        if self._temporary is not None:
            for name in self._pool.sessions():
                self._pool.remove(name)
        self._pool.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _origin(self, name: str, ids: list[int], text: bytes, pack: Pack | None) -> Origin | None:
        """Where the state `name` stands, if the prompt continues it."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        num_tokens, num_bytes = int(match[1]) - (0 if pack is None else pack.position), int(match[3])
        if 0 < num_tokens < len(ids) and self._hash(_bytes(ids[:num_tokens]), pack) == match[2]:
            known = self._llm.detokenizer.whole_text(ids[:num_tokens])
            return Origin(pack, ids[:num_tokens], None if known is None else known.encode(), ids[num_tokens:])
        if 0 < num_bytes < len(text) and self._hash(text[:num_bytes], pack) == match[4]:
            rest = self._llm.encode(text[num_bytes:].decode(), add_special_tokens=False)
            if rest and rest[0] in self._llm.detokenizer.special_ids:  # where a tokenizer always cuts
                return Origin(pack, None, text[:num_bytes], rest)
        return None

    def _copy(self, name: str, session: Session) -> bool:
        with self._use(name):
            if name not in self._pool:  # forgotten meanwhile
                return False
            try:
                with self._pool.acquire(name, timeout=None) as kept:
                    state = kept.state()
            except (CorruptError, VersionError, StateMismatchError) as e:
                self._metrics.snapshot_errors.inc()
                log.warning("a kept conversation is forgotten: %s", e)
                self._pool.remove(name)
                return False
        session.set_state(state)
        return True

    @contextlib.contextmanager
    def _use(self, name: str) -> Iterator[None]:
        """One thread at a time for each name; without a directory one at all, so that what is kept fits in memory."""
        with contextlib.nullcontext() if self._temporary is None else self._alone:
            with self._lock:
                use = self._used.setdefault(name, _Use())
                use.threads += 1
            try:
                with use.lock:
                    yield
            finally:
                with self._lock:
                    use.threads -= 1
                    if not use.threads:
                        del self._used[name]
                    self._forget_beyond_limit()

    def _forget_beyond_limit(self) -> None:
        names = [name for name in self._pool.sessions() if _NAME.fullmatch(name)]  # least recently used first
        for name in names[: max(0, len(names) - self._keep)]:
            if name not in self._used:
                try:
                    self._pool.remove(name)
                except LococoError as e:
                    self._metrics.snapshot_errors.inc()
                    log.warning("a kept conversation could not be forgotten: %s", e)
        self._metrics.snapshots.set(min(len(names), self._keep))

    def _hash(self, data: bytes, pack: Pack | None) -> str:
        return hashlib.sha256(self._salt + (b"" if pack is None else pack.key) + data).hexdigest()[:32]


def _num_tokens(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, "<i4").tobytes()
