"""Errors as OpenAI's API words them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from lococo_runtime import ChatTemplateError, EmptyPromptError, GrammarError, InvalidArgumentError, LococoError

log = logging.getLogger("lococo_server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_PARAMS = {"ids": "prompt", "text": "prompt"}  # what the runtime calls them


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP; what the openai client picks the exception's class by.
        message: expected, got, likely fix.
        param: the parameter at fault, if it is one.
        code: a word for programs.
        headers: added to the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer. ASCII, as a message may quote text that is no Unicode."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""


def from_exception(e: Exception) -> ApiError:
    """What a client is told of an error of the runtime. What it cannot correct is logged and not told."""
    if isinstance(e, ApiError):
        return e
    if isinstance(e, InvalidArgumentError):
        named = re.match(r"[a-z_]+(?=[\[:])", str(e))
        param = _PARAMS.get(named[0], named[0]) if named else None
        if isinstance(e, GrammarError):
            param = "response_format"
        elif isinstance(e, ChatTemplateError):
            param = "messages"
        elif isinstance(e, EmptyPromptError):
            param = "prompt"
        return ApiError(400, str(e), param=param, code="invalid_value")
    log.error("%s", e, exc_info=e)
    kind = type(e).__name__ if isinstance(e, LococoError) else "internal error"
    return ApiError(500, f"{kind}; the server's log says more", code="internal_error")


def from_validation(e: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    error = e.errors()[0]
    path = [str(part) for part in error["loc"][1:]]
    if error["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON: {error['ctx']['error']}", code="invalid_json")
    if not path:
        return ApiError(400, f"body: {error['msg']}", code="invalid_body")
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: this parameter is not supported", param=path[0], code="unsupported_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{where}: this parameter is required", param=path[0], code="missing_required_parameter")
    got = ascii(error["input"])
    shown = got if len(got) <= 80 else f"{got[:80]}..."
    return ApiError(400, f"{where}: {error['msg']}, got {shown}", param=path[0], code="invalid_value")
