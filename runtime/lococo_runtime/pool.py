"""Many sessions by name on one set of weights: a few in memory, the others parked on disk."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from typing import Literal

from . import _c_api as c
from ._exceptions import BusyError, ClosedError, InvalidArgumentError, LococoError, NotFoundError
from .session import Model, Session, _Handle

Place = Literal["acquired", "memory", "disk"]
_PLACES: tuple[Place, ...] = ("acquired", "memory", "disk")


@dataclass(frozen=True)
class PoolInfo:
    """What a pool holds, and what it has done since it was opened.

    memory_bytes is at most max_sessions * session_bytes. num_acquired, num_idle (in memory) and num_parked (on disk
    alone) add up to the sessions known. parks and resumes count state files written and read.
    """

    max_sessions: int
    session_bytes: int
    memory_bytes: int
    num_acquired: int
    num_idle: int
    num_parked: int
    parks: int
    resumes: int


class PooledSession(Session):
    """A session of a pool: `close`, or leaving its `with` block, gives it back.

    Attributes:
        id: its name in the pool.
    """

    def __init__(self, pool: SessionPool, session_id: str, handle: ctypes.c_void_p) -> None:
        self._handle, self._owns_model, self.model = handle, False, pool.model
        self._pool = pool
        self.id = session_id

    def close(self) -> None:
        """Gives the session back to its pool, as `SessionPool.release`. Closing twice is fine."""
        if self._handle:
            self._pool.release(self)


class SessionPool(_Handle):
    """Sessions by name. Usable from many threads, each of its sessions by one at a time. A context manager.

    A session that is released stays in memory until the budget is needed for another one; then the least recently
    used is written to the directory, and read from there when it is acquired again. What is there survives the
    process: a pool opened on the same directory goes on with it.

    Args:
        model: whose sessions they are. It may be closed before the pool.
        directory: for the state files; made if its parent is there. One pool at a time.
        budget_bytes: memory of all sessions together, `Model.session_bytes` each.
        max_sessions: the same as a number of sessions. Exactly one of the two.

    Raises:
        InvalidArgumentError: a budget below one session, or not exactly one budget.
        BusyError: another pool has the directory.
        NotFoundError, StorageError: the directory cannot be made or read.
    """

    def __init__(
        self,
        model: Model,
        directory: str | os.PathLike[str],
        *,
        budget_bytes: int | None = None,
        max_sessions: int | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        self.model = model
        if (budget_bytes is None) == (max_sessions is None):
            raise InvalidArgumentError("SessionPool: expected one of budget_bytes and max_sessions")
        for name, value in (("budget_bytes", budget_bytes), ("max_sessions", max_sessions)):
            if value is not None and not (isinstance(value, int) and value is not True and 1 <= value < 2**64):
                raise InvalidArgumentError(f"{name}: expected an integer from 1 on, got {value!r}")
        if not model._handle or model._closing:
            raise ClosedError("the model is closed; open it again before making a pool")
        options = c.PoolOptions(
            ctypes.sizeof(c.PoolOptions), c.encode_path(directory), budget_bytes or 0, max_sessions or 0
        )
        c.call("lococo_pool_create", model._handle, ctypes.byref(options), ctypes.byref(self._handle))
        model._count(+1)

    def acquire(
        self, session_id: str, *, start: str | os.PathLike[str] | None = None, timeout: float | None = 0
    ) -> PooledSession:
        """The session of this name as it was released last: from memory, from its state file, or a new one.

        Args:
            session_id: any text without NUL, up to 200 characters where each but a-z 0-9 - _ . counts as three a byte.
            start: a state file that a new session starts from ("memory pack"); a known one does not read it.
            timeout: seconds to wait for another thread to release this session, or any if the budget is used up;
                None waits for ever.

        Raises:
            BusyError: acquired already.
            PoolFullError: every session that the budget allows is acquired.
            NoSpaceError, StorageError: another session could not be parked; it stays in memory, nothing is lost.
            CorruptError, VersionError, StateMismatchError, NotFoundError: the state file is damaged, of another
                schema or bundle, or gone. `remove` forgets it.
        """
        timeout_ms = -1 if timeout is None else _milliseconds(timeout)
        handle = ctypes.c_void_p()
        c.call(
            "lococo_pool_acquire",
            self._open(),
            _encoded(session_id),
            None if start is None else c.encode_path(start),
            timeout_ms,
            ctypes.byref(handle),
        )
        return PooledSession(self, session_id, handle)

    def release(self, session: PooledSession) -> None:
        """Gives a session back; it leaves its batch and is closed then. A dead one is dropped: what was written last
        stands.

        Raises:
            InvalidArgumentError: a session that is not this pool's.
            BusyError: another thread is inside a call; the session stays acquired.
        """
        if not isinstance(session, PooledSession) or session._pool is not self:
            raise InvalidArgumentError("session: expected one acquired from this pool")
        if session._batch is not None:
            session._batch.remove(session)
        pool, _ = self._open(), session._open()
        with self.model._lock:  # another thread may be cancelling it
            handle, session._handle = session._handle, ctypes.c_void_p()
        try:
            c.call("lococo_pool_release", pool, handle)
        except LococoError:
            session._handle = handle
            raise

    def flush(self, session_id: str | None = None) -> None:
        """Writes an idle session, by default all, to disk where it is newer there; it stays in memory.

        Raises:
            NotFoundError, BusyError: no such session; it is acquired.
            NoSpaceError, StorageError: it stays in memory.
        """
        c.call("lococo_pool_flush", self._open(), None if session_id is None else _encoded(session_id))

    def remove(self, session_id: str) -> None:
        """Deletes an idle session and its state file. Raises NotFoundError, BusyError, StorageError."""
        c.call("lococo_pool_remove", self._open(), _encoded(session_id))

    def sessions(self) -> dict[str, Place]:
        """Every session and where it is, least recently used first."""
        found: dict[str, Place] = {}

        def collect(session_id: bytes, place: int, _: object) -> int:
            found[session_id.decode("utf-8", "surrogateescape")] = _PLACES[place]
            return 0  # go on

        c.call("lococo_pool_list", self._open(), c.PlaceFn(collect), None)
        return found

    def __contains__(self, session_id: str) -> bool:
        place = ctypes.c_int()
        try:
            c.call("lococo_pool_find", self._open(), _encoded(session_id), ctypes.byref(place))
        except NotFoundError:
            return False
        return True

    def info(self) -> PoolInfo:
        """Sizes and counts."""
        native = c.PoolInfo(ctypes.sizeof(c.PoolInfo))
        c.call("lococo_pool_get_info", self._open(), ctypes.byref(native))
        return PoolInfo(*(getattr(native, name) for name in PoolInfo.__dataclass_fields__))

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ClosedError("the pool is closed; create a new one")
        return self._handle

    def close(self) -> None:
        """Flushes every session and frees the memory. Closing twice is fine.

        Raises:
            BusyError: a session is acquired; nothing is freed.
            NoSpaceError, StorageError: a session could not be written; the pool stays open.
        """
        if self._handle:
            self.flush()
            if acquired := self.info().num_acquired:
                raise BusyError(f"pool: {acquired} sessions are acquired; release them first")
            self._destroy()

    def _destroy(self) -> None:
        c.library().lococo_pool_destroy(self._handle)
        self._handle = ctypes.c_void_p()
        self.model._count(-1)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            try:
                self.flush()
            finally:  # nobody can reach it any more, nor any session of it
                self._destroy()


def _encoded(session_id: str) -> bytes:
    if not isinstance(session_id, str):
        raise InvalidArgumentError(f"session id: expected text, got {type(session_id).__name__}")
    try:
        encoded = session_id.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as e:
        raise InvalidArgumentError(f"session id: expected text, got a lone surrogate: {e}") from e
    if b"\0" in encoded:
        raise InvalidArgumentError("session id: expected no NUL character")
    return encoded


def _milliseconds(seconds: float) -> int:
    if not (isinstance(seconds, (int, float)) and 0 <= seconds <= 2_000_000):
        raise InvalidArgumentError(f"timeout: expected None or 0 to 2,000,000 s, got {seconds}")
    return math.ceil(seconds * 1000)
