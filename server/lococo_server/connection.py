"""Connections: how long a request's head may take, clients that have gone, and errors of HTTP itself."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

_POLL_SECONDS = 0.002, 0.02  # at first, and later: one that has gone is mostly found by its first token
_ASK_AFTER_SECONDS = 0.05  # most answers to clients that close their half have been sent by then
_TCP_CLOSE = 7  # of Linux's tcp_info.tcpi_state
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
        self._ended = False  # the client sends nothing more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > self._most:
            self._refuse(ApiError(503, f"{self._most} connections are open already", code="too_many_connections"))

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed the connection, or its half of it; True keeps the other half open.

        The two look alike until something is written: a client that has gone resets the connection then.
        """
        if self._refused:
            return True
        if self._has_no_request and not self.conn.trailing_data[0]:
            return False
        if self._has_no_request or self.conn.their_state is h11.SEND_BODY:
            self._refuse(ApiError(400, "the connection ended before the request did", code="invalid_http"))
            return True
        if self.cycle.response_complete or not hasattr(socket, "TCP_INFO"):
            return False
        if not self._ended:
            self._ended = True
            self._watch_reader(self.loop.time() + _ASK_AFTER_SECONDS, _POLL_SECONDS[0])
        return True

    def _watch_reader(self, ask_at: float | None, seconds: float) -> None:
        """Ends the connection once it is reset. Tokens of a stream provoke that; before an answer an empty one does."""
        if self.cycle.response_complete or self.transport.is_closing():
            return
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if info[0] == _TCP_CLOSE:
            self.transport.abort()
            return
        if ask_at is not None and not self.cycle.response_started and self.loop.time() >= ask_at:
            ask_at = None
            nothing = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(nothing) or b"")
        self.loop.call_later(seconds, self._watch_reader, ask_at, min(1.1 * seconds, _POLL_SECONDS[1]))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ended:
            self.transport.close()

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
