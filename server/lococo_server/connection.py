"""Connections: how long a request's head may take and how large it may be, and errors of HTTP itself."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

_LINGER_SECONDS = 1.0  # after an error: closing a connection on unread data would take back the answer


class Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for a request's head for ever.

    h11 rather than a faster parser: it limits what it has not understood yet, and its events cost microseconds where a
    token costs milliseconds.

    Args:
        head_seconds: for a request's line and headers to arrive, and for the rest of a body that was answered before
            its end.
        most: connections at once; one more is told so and closed.
        **options: as uvicorn's.
    """

    def __init__(self, *, head_seconds: float, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._most = most
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > self._most:
            self._refuse(ApiError(503, f"{self._most} connections are open already", code="too_many_connections"))

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    @property
    def _has_no_request(self) -> bool:
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _watch_head(self) -> None:
        if not self._has_no_request:
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self._head_is_late)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._has_no_request and not self.transport.is_closing():
            if not self.conn.trailing_data[0]:  # browsers open connections that they may never use
                self.transport.close()
                return
            self._refuse(ApiError(408, f"expected a request's headers within {self._head_seconds:g} s", code="timeout"))

    def send_400_response(self, msg: str) -> None:
        """Called where h11 has raised."""
        found = sys.exc_info()[1]
        status = found.error_status_hint if isinstance(found, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"expected HTTP/1.1: {found or msg}", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless an answer has begun, and closes."""
        self._refused = True
        self._stop_watching()
        if self.cycle is not None and not self.cycle.response_complete:  # who still waits for its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            heads_only = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            self.transport.write(self.conn.send(h11.Response(status_code=error.status, headers=headers)) or b"")
            body = b"" if heads_only else bytes(response.body)
            self.transport.write(self.conn.send(h11.Data(data=body)) or b"")
            self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
            self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()
