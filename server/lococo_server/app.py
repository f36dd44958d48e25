"""The HTTP application: routes, the gate in front of them, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from lococo_runtime import (
    LLM,
    CompletionChunk,
    CompletionOutput,
    Grammar,
    InvalidArgumentError,
    LococoError,
    SamplingParams,
)
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answers
from .engine import Engine, Lifetime, Limits, Work
from .errors import ApiError, ClientGoneError, from_exception, from_validation
from .metrics import Metrics
from .protocol import ChatAnswer, ChatRequest, CompletionAnswer, CompletionRequest, Json, describe_requests
from .snapshots import Pack

log = logging.getLogger("lococo_server")

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_DISCARDED_BYTES = 64 << 20  # of a body that is too large: a client that is still sending reads no answer
_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    llm: LLM,
    *,
    limits: Limits | None = None,
    model_name: str = "lococo",
    api_key: str | None = None,
    allowed_hosts: Collection[str] | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    packs: Mapping[str, str | os.PathLike[str]] | None = None,
) -> FastAPI:
    """An ASGI application that serves a bundle; it closes `llm` when it shuts down.

    `app.state.end_all()` ends every request that is running or waiting with an error of status 503.

    Args:
        llm: the bundle.
        limits: see `Limits`.
        model_name: what clients call the model.
        api_key: what clients of /v1 must send as a bearer token; None asks for nothing.
        allowed_hosts: names and addresses in lower case, without port, that clients may call the server by; None allows
            all. It keeps out a page whose own name resolves to this machine (DNS rebinding).
        state_dir: where conversations are kept, so that they survive the process; None keeps them in memory.
        packs: state files by name. Each is a model of its own for clients, `model_name:name`, whose prompts are read
            behind what the state has read.

    Raises:
        see `SessionPool`, which has state_dir, and `Session.load`, which reads the packs.
    """
    limits = limits or Limits()
    loaded = {f"{model_name}:{name}": Pack.load(llm.model, path) for name, path in (packs or {}).items()}
    models: dict[str, Pack | None] = {model_name: None, **loaded}
    metrics = Metrics()
    engine = Engine(llm, limits, state_dir=state_dir, metrics=metrics)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    # the usual documentation pages load scripts from elsewhere
    app = FastAPI(
        title="lococo-serve",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"model": answers.Error, "description": "An error"} for status in ("4XX", "5XX")},
    )
    app.state.end_all = engine.end_all
    app.add_middleware(_Gate, limits=limits, api_key=api_key, allowed_hosts=allowed_hosts, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, e: RequestValidationError) -> Response:
        return from_validation(e).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, e: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {e.detail}"
        return ApiError(e.status_code, message, headers=dict(e.headers or {})).response()

    for kind in (ApiError, LococoError):

        @app.exception_handler(kind)
        async def ours(_: Request, e: Exception) -> Response:
            return from_exception(e).response()

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, e: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it

    def card(name: str, pack: Pack | None) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "lococo",
            "state_bytes": llm.model.state_bytes,
            "num_slots": llm.model.manifest.cache.mem_size,
            "num_read": 0 if pack is None else pack.position,
        }

    def find(name: str) -> Pack | None:
        if name not in models:
            message = f"model: expected {' or '.join(models)}, got {name[:200]!a}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    def check_length(ids: list[int], param: str) -> None:
        if len(ids) > limits.prompt_tokens:
            message = f"{param}: expected at most {limits.prompt_tokens} tokens, got {len(ids)}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    @app.get("/v1/models", response_model=answers.ModelList)
    async def list_models() -> Json:
        return {"object": "list", "data": [card(*each) for each in models.items()]}

    @app.get("/v1/models/{name:path}", response_model=answers.ModelCard)
    async def model(name: str) -> Json:
        return card(name, find(name))

    def works(
        prompts: Sequence[list[int]], n: int, params: SamplingParams, grammar: Grammar | None = None, **more: Any
    ) -> list[Work]:
        """Those of one request: n choices for each prompt, with seeds that follow one another."""
        each = [dataclasses.replace(params, seed=(params.seed + i) % 2**64) for i in range(n)]
        return [Work(ids, one, grammar, **more) for ids in prompts for one in each]

    @app.post(_COMPLETIONS, responses=_streamed(answers.Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        pack = find(body.model)
        params = body.params(limits.new_tokens)
        prompts = body.prompts()
        ids = await engine.call(
            lambda: [llm.encode(p, add_special_tokens=pack is None) if isinstance(p, str) else p for p in prompts]
        )
        for prompt in ids:
            check_length(prompt, "prompt")
        todo = works(ids, body.n, params, pack=pack)
        echoes = []
        if body.echo:
            texts = [p if isinstance(p, str) else llm.tokenizer.decode(p, skip_special_tokens=False) for p in prompts]
            echoes = [text for text in texts for _ in range(body.n)]
        return await _respond(engine, todo, CompletionAnswer(llm, body, params, len(todo), echoes), body, request)

    @app.post(_CHAT, responses=_streamed(answers.ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        pack = find(body.model)
        params = body.params(limits.new_tokens)
        grammar = body.response_format.grammar() if body.response_format is not None else None

        def render() -> tuple[str, list[int]]:
            text = llm.apply_chat_template(
                [message.for_template() for message in body.messages], chat_template_kwargs=body.chat_template_kwargs
            )
            return text, llm.encode(text, add_special_tokens=False)

        try:
            text, ids = await engine.call(render)
        except InvalidArgumentError as e:
            if str(e).startswith("chat_template_kwargs:"):
                raise
            raise ApiError(400, f"messages: {e}", param="messages", code="invalid_value") from e
        check_length(ids, "messages")
        todo = works([ids], body.n, params, grammar, pack=pack, text=text if body.cache_prompt else None)
        return await _respond(engine, todo, ChatAnswer(llm, body, params, len(todo)), body, request)

    @app.get("/health", response_model=answers.Health)
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    describe = app.openapi

    def describe_this_server() -> Json:
        schema = describe()
        describe_requests(
            schema["components"]["schemas"],
            models=list(models),
            max_tokens=limits.new_tokens,
            vocab_size=llm.model.vocab_size,
            min_prompt=0 if llm.encode("") else 1,
        )
        if api_key is not None:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                for operation in methods.values() if path.startswith("/v1/") else ():
                    operation["security"] = [{"key": []}]
        return schema

    app.openapi = describe_this_server  # type: ignore[method-assign]  # FastAPI's documentation does so

    page = resources.files(__package__).joinpath("chat.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    return app


def _streamed(model: type[BaseModel]) -> dict[int | str, Json]:
    """Of an answer that can be a stream."""
    events = {"schema": {"description": "server-sent events: the answer in chunks, each as JSON, then [DONE]"}}
    return {200: {"model": model, "content": {"text/event-stream": events}}}


_Chunks = AsyncGenerator[tuple[int, CompletionChunk], None]


async def _respond(
    engine: Engine,
    works: Sequence[Work],
    answer: CompletionAnswer | ChatAnswer,
    body: CompletionRequest | ChatRequest,
    request: Request,
) -> Response:
    """The answer: JSON, or a stream that has its first token, so that what goes wrong before has a status."""
    life = engine.begin(request.receive)
    chunks = engine.chunks(works, life)
    try:
        first = await anext(chunks)
        if body.stream:
            return _EventStream(_events(chunks, first, works, answer), chunks, life)
        async for _ in chunks:
            pass
    except BaseException:
        await chunks.aclose()
        life.close()
        raise
    life.close()
    return Response(json.dumps(answer.whole(_outputs(works))), media_type="application/json")


def _outputs(works: Sequence[Work]) -> list[CompletionOutput]:
    outputs = [work.output for work in works if work.output is not None]
    if len(outputs) != len(works):
        raise RuntimeError("a completion ended without an output")
    return outputs


async def _events(
    chunks: _Chunks, first: tuple[int, CompletionChunk], works: Sequence[Work], answer: CompletionAnswer | ChatAnswer
) -> AsyncGenerator[Json, None]:
    for event in answer.begin():
        yield event
    following: tuple[int, CompletionChunk] | None = first
    while following is not None:
        if (event_or_none := answer.chunk(*following)) is not None:
            yield event_or_none
        following = await anext(chunks, None)
    for event in answer.end(_outputs(works)):
        yield event


class _EventStream(Response):
    """Server-sent events, one for each JSON object, and [DONE]. An error becomes the last event."""

    def __init__(self, events: AsyncGenerator[Json, None], chunks: _Chunks, life: Lifetime) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events, self._chunks, self._life = events, chunks, life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # a client that reads nothing keeps the session no longer than the request may take
            await asyncio.wait_for(self._send(send), self._life.seconds_left + 1)
        except (ClientGoneError, asyncio.TimeoutError):
            log.info("a stream ended because its client reads it no more")
        finally:
            await self._events.aclose()
            await self._chunks.aclose()
            self._life.close()

    async def _send(self, send: Send) -> None:
        async def write(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await write(json.dumps(event))
            await write("[DONE]")
        except (ApiError, LococoError) as e:
            await write(json.dumps(from_exception(e).body))
        await send({"type": "http.response.body", "body": b""})


class _Gate:
    """In front of all routes: host, key, content type, the body's size and time; it reads the body and counts.

    A slash at a path's end makes no difference, and HEAD is GET without a body, which the connection leaves out.

    Args:
        app: what it lets requests through to.
        limits: body_bytes, body_seconds.
        api_key: of /v1, or None.
        allowed_hosts: see `create_app`.
        metrics: counts the answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        api_key: str | None,
        allowed_hosts: Collection[str] | None,
        metrics: Metrics,
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._api_key, self._allowed_hosts = api_key, allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"].rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = scope.get("route")
                label = getattr(route, "path", "other")  # not the client's own text: it could be anything
                self._metrics.responses.labels(label, str(message["status"])).inc()
            await send(message)

        try:
            self._check_host(headers.get("host"))
            if path.startswith("/v1/"):
                self._check_key(headers.get("authorization", ""))
            takes_body = scope["method"] == "POST" and path in (_COMPLETIONS, _CHAT)
            body = await self._read(headers, receive) if takes_body else b""
            await self._app(scope, _replay(body, receive), counted)
        except ClientGoneError:
            log.debug("a client went away while it sent its body")
        except ApiError as e:
            await e.response()(scope, receive, counted)
        except Exception as e:
            log.exception("a request failed")
            if started:
                raise
            await from_exception(e).response()(scope, receive, counted)

    def _check_host(self, host: str | None) -> None:
        if self._allowed_hosts is None or host is None:  # HTTP/1.0, which no browser speaks
            return
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self._allowed_hosts:
            message = f"Host: expected {' or '.join(self._allowed_hosts)}, got {host[:200]!a}; see --allow-host"
            raise ApiError(403, message, code="host_not_allowed")

    def _check_key(self, authorization: str) -> None:
        if self._api_key is None:
            return
        scheme, _, key = authorization.partition(" ")
        given, expected = key.strip().encode("latin-1"), self._api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
            message = "expected the server's key as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The body. Raises ApiError, ClientGoneError."""
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            body = await asyncio.wait_for(self._collect(headers, receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            message = f"body: expected all of it within {self._limits.body_seconds:g} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        if body is None:
            message = f"body: expected at most {self._limits.body_bytes} bytes"
            raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            message = f"Content-Encoding: expected none, got {encoding[:100]!a}"
            raise ApiError(415, message, code="unsupported_encoding")
        if media_type != "application/json":
            message = f"Content-Type: expected application/json, got {media_type or 'none'}"
            raise ApiError(415, message, code="unsupported_media_type")
        return body

    async def _collect(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The body, or None if it is too large; up to a point it is read nevertheless, and thrown away."""
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > _DISCARDED_BYTES:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            size += len(message.get("body", b""))
            if size <= self._limits.body_bytes:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
            if not message.get("more_body", False):
                return b"".join(parts) if size <= self._limits.body_bytes else None
            if size > _DISCARDED_BYTES:
                return None


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Any]]:
    """A receive that gives the body at once, and then what comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
