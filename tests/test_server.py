"""lococo-serve as its clients see it: a process, the openai client, and sockets that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from bundles import EOS, export_text
from lococo_runtime import LLM, Batch, CancelledError, SamplingParams, SessionPool, TokenIdError
from lococo_server.batching import SharedSteps
from lococo_server.cli import main as serve_main
from lococo_server.metrics import Metrics
from lococo_server.snapshots import Origin, Snapshots
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from test_llm import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import fuzz_http

LETTERS = {str(i): 100 for i in range(64, 90)}  # byte tokens of ASCII characters: text that encodes as it was written
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SHORT = ("--body-timeout", "2", "--head-timeout", "2")
SECONDS = 60  # for anything to happen; nothing here takes that long


class Server:
    """A lococo-serve process on a free port."""

    def __init__(self, bundle: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", "0", "--threads", "1", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self.port = 0
        for line in self.process.stderr or ():
            self.lines.append(line)
            if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            self.process.communicate()
            raise RuntimeError("".join(self.lines))
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self._reader.start()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, by a client that sends what it is told to."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": "application/json", **named})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        status, answer_headers, data = self.request("POST", path, json.dumps(body).encode(), **headers)
        return status, answer_headers, json.loads(data)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.request("GET", "/metrics")[2].decode(), re.MULTILINE)
        assert found, name
        return float(found[1])

    def wait_for(self, name: str, value: float) -> None:
        end = time.monotonic() + SECONDS
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name}: {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def serving(bundle: Path, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(bundle, *options, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_text(tmp_path_factory.mktemp("server") / "bundle")


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[LLM]:
    with LLM(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--sessions", "4", "--max-new-tokens", "100000", *SHORT) as running:
        yield running
        assert running.stop() == 0
        assert not [line for line in running.lines if "Traceback" in line]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened


def completion_body(**changes: Any) -> dict[str, Any]:
    return {"model": "bundle", "prompt": "Hello", "max_tokens": 5, **changes}


def chat_body(**changes: Any) -> dict[str, Any]:
    return {"model": "bundle", "messages": HELLO, "max_tokens": 5, **changes}


def endless(**changes: Any) -> dict[str, Any]:
    """A request that does not end by itself within a test."""
    return completion_body(max_tokens=100_000, stream=True, **{"ignore_eos": True, **changes})


# --- what is answered ------------------------------------------------------------------------------------------------


def test_the_address_is_printed(bundle: Path) -> None:
    """The one line on stdout, and it is true at once."""
    command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert openai.OpenAI(base_url=f"{address}/v1", api_key="none").models.list().data[0].id == "bundle"
        finally:
            process.terminate()
        assert process.stdout.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--port 65536", "expected 0 to 65535"),
        ("--port -1", "expected 0 to 65535"),
        ("--sessions 0", "sessions: expected at least 1"),
        ("--timeout nan", "seconds: expected more than 0"),
        ("--max-body-bytes 0", "body_bytes: expected at least 1"),
        ("--pack a=b --pack a=c", "each name once"),
        ("--pack =b", "expected NAME=FILE"),
    ],
)
def test_flags_that_are_refused(bundle: Path, options: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code = serve_main([str(bundle), *options.split()])
    except SystemExit as e:  # argparse's
        code = e.code
    assert code != 0
    assert said in capfd.readouterr().err


def test_an_address_that_is_taken(server: Server, bundle: Path) -> None:
    command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", str(server.port), "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_models(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("bundle").id == "bundle"
    assert model.model_dump()["state_bytes"] == llm.model.state_bytes
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_the_runtime_s(client: openai.OpenAI, llm: LLM) -> None:
    """Every sampling parameter arrives."""
    named: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": 7, "presence_penalty": 0.5}
    named |= {"frequency_penalty": 0.3, "stop": ["zz", "@"]}
    ours: dict[str, Any] = {"top_k": 50, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.1}
    ours |= {"stop_token_ids": [3, 250], "ignore_eos": True}
    bias = {65: 3.0, 66: -100.0}
    expected = llm.generate("Hello", SamplingParams(max_tokens=40, logit_bias=bias, **named, **ours))
    for prompt in ("Hello", ["Hello"], llm.encode("Hello"), [llm.encode("Hello")]):
        out = client.completions.create(
            model="bundle",
            prompt=prompt,
            max_tokens=40,
            logit_bias={str(k): int(v) for k, v in bias.items()},
            extra_body=ours,
            **named,
        )
        assert out.choices[0].text == expected.text
        assert out.choices[0].finish_reason == expected.finish_reason
        assert out.usage is not None
        assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (5, len(expected.token_ids))


def test_a_chat_is_the_runtime_s(client: openai.OpenAI, llm: LLM) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    expected = llm.chat(same, SamplingParams(temperature=1.0, seed=3, max_tokens=30))
    for name in ("max_tokens", "max_completion_tokens"):
        out = client.chat.completions.create(model="bundle", messages=messages, seed=3, **{name: 30})  # type: ignore
        assert out.choices[0].message.content == expected.text
        assert out.choices[0].message.role == "assistant"
        assert out.choices[0].finish_reason == expected.finish_reason


def test_streams_add_up(client: openai.OpenAI) -> None:
    body = chat_body(max_tokens=30, seed=2, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices if c.finish_reason] == [whole.choices[0].finish_reason]
    entries = [entry for c in choices if c.logprobs for entry in c.logprobs.content or ()]
    assert entries == whole.choices[0].logprobs.content

    body = completion_body(max_tokens=30, seed=2, logprobs=2)
    text = client.completions.create(**body)
    pieces = list(client.completions.create(**body, stream=True))
    assert "".join(c.choices[0].text for c in pieces) == text.choices[0].text
    assert [t for c in pieces for t in c.choices[0].logprobs.tokens] == text.choices[0].logprobs.tokens
    assert [t for c in pieces for t in c.choices[0].logprobs.text_offset] == text.choices[0].logprobs.text_offset


def test_several_choices_and_prompts(client: openai.OpenAI) -> None:
    """Choice j of n is what seed + j gives alone; prompts count once each."""
    prompts = ["one", "twenty"]
    alone = [
        client.completions.create(**completion_body(prompt=prompt, seed=seed, max_tokens=20)).choices[0].text
        for prompt in prompts
        for seed in (7, 8, 9)
    ]
    body = completion_body(prompt=prompts, seed=7, n=3, best_of=3, max_tokens=20)
    out = client.completions.create(**body)
    assert [(c.index, c.text) for c in out.choices] == list(enumerate(alone))
    assert out.usage is not None
    assert out.usage.prompt_tokens == len("one") + len("twenty")
    assert out.usage.completion_tokens > 3 * 20
    text = [""] * 6
    for chunk in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        assert (chunk.usage is None) == bool(chunk.choices)
        for choice in chunk.choices:
            text[choice.index] += choice.text
    assert text == alone
    assert chunk.usage == out.usage
    many = client.completions.create(**completion_body(n=40, seed=7))  # ten times as many as run at once
    assert [c.index for c in many.choices] == list(range(40))
    for j in (0, 39):
        assert many.choices[j].text == client.completions.create(**completion_body(seed=7 + j)).choices[0].text

    chat = chat_body(seed=7, n=2, max_tokens=20, logprobs=True)
    said = client.chat.completions.create(**chat).choices
    assert [c.index for c in said] == [0, 1]
    second = client.chat.completions.create(**chat_body(seed=8, max_tokens=20, logprobs=True)).choices[0]
    assert (said[1].message, said[1].logprobs) == (second.message, second.logprobs)
    streamed = ["", ""]
    roles = []
    for chunk in client.chat.completions.create(**chat, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] * (choice.delta.role is not None)
    assert streamed == [c.message.content for c in said]
    assert roles == ["assistant"] * 2


def test_an_error_of_one_choice_ends_all(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**completion_body(prompt=["a", ""], max_tokens=100_000))
    server.wait_for("lococo_running_requests", 0)
    stream = client.completions.create(**completion_body(n=6, max_tokens=100_000), stream=True)
    next(iter(stream))
    stream.close()
    server.wait_for("lococo_running_requests", 0)
    server.wait_for("lococo_waiting_requests", 0)


def test_echo(client: openai.OpenAI, llm: LLM) -> None:
    body = completion_body(seed=1, max_tokens=20)
    text = client.completions.create(**body).choices[0].text
    for prompt in ("Hello", llm.encode("Hello")):
        body = completion_body(seed=1, max_tokens=20, prompt=prompt, echo=True)
        assert client.completions.create(**body).choices[0].text == "Hello" + text
        chunks = client.completions.create(**body, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == "Hello" + text
    nothing = client.completions.create(**completion_body(max_tokens=0, echo=True)).choices[0]
    assert (nothing.text, nothing.finish_reason) == ("Hello", "length")


def test_what_clients_send_besides(client: openai.OpenAI) -> None:
    """Labels, nulls, and an answer's message sent back as it came."""
    labels: dict[str, Any] = {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": False}
    labels |= {"prompt_cache_key": "k", "service_tier": "auto"}
    out = client.chat.completions.create(**chat_body(**labels, stop=None, logit_bias=None, response_format=None))
    message = out.choices[0].message
    again = [*HELLO, message, message.model_dump(), {"role": "user", "content": "More", "name": "me"}]
    assert client.chat.completions.create(**chat_body(messages=again)).choices
    assert client.completions.create(**completion_body(user="u", stop=["a", "b", "c", "d"], suffix=None)).choices


def test_the_stream_is_server_sent_events(server: Server) -> None:
    body = json.dumps(chat_body(stream=True)).encode()
    status, headers, data = server.request("POST", "/v1/chat/completions", body)
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert {json.loads(event.removeprefix("data: "))["object"] for event in events} == {"chat.completion.chunk"}


class Lighthouse(BaseModel):
    lit: bool
    steps: list[bool]


def test_the_client_s_helpers(client: openai.OpenAI) -> None:
    """parse() holds an answer to a class, and stream() puts the chunks together again."""
    body = chat_body(max_tokens=2000, seed=1, logit_bias={str(EOS): 1})
    parsed = client.chat.completions.parse(**body, response_format=Lighthouse).choices[0].message.parsed
    assert parsed is not None
    with client.chat.completions.stream(**body, response_format=Lighthouse) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    raw = client.chat.completions.with_raw_response.create(**chat_body())
    assert raw.parse().choices[0].message.role == "assistant"


def test_a_client_without_patience(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**completion_body(max_tokens=100_000, logit_bias=LETTERS))
    server.wait_for("lococo_running_requests", 0)


def test_the_async_client(server: Server) -> None:
    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            body = completion_body(seed=1, max_tokens=20)
            answers = await asyncio.gather(*(client.completions.create(**body) for _ in range(6)))
            stream = await client.completions.create(**body, stream=True)
            return [a.choices[0].text for a in answers], "".join([c.choices[0].text async for c in stream])

    whole, streamed = asyncio.run(ask())
    assert set(whole) == {streamed}


def test_logprobs_are_the_runtime_s(client: openai.OpenAI, llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, seed=4, max_tokens=8, ignore_eos=True, logprobs=3)
    expected = llm.generate("Hello", sampling).logprobs or []
    out = client.completions.create(
        **completion_body(max_tokens=8, seed=4, logprobs=3, extra_body={"ignore_eos": True})
    )
    logprobs = out.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [e.logprob for e in expected]
    assert [list(top.values()) for top in logprobs.top_logprobs or ()] == [list(e.top.values()) for e in expected]
    chat = client.chat.completions.create(**chat_body(max_tokens=30, seed=1, logprobs=True, logit_bias=LETTERS))
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert [bytes(entry.bytes or ()).decode() for entry in content] == [entry.token for entry in content]


def test_stop_ends_before_the_text(client: openai.OpenAI) -> None:
    body = completion_body(max_tokens=60, seed=1, logit_bias=LETTERS)
    full = client.completions.create(**body).choices[0].text
    stop = full[20:22]
    out = client.completions.create(**body, stop=stop)
    assert out.choices[0].text == full[: full.index(stop)]
    assert out.choices[0].finish_reason == "stop"
    ended = client.completions.create(**completion_body(logit_bias={str(EOS): 100}))
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")


def test_seeds(client: openai.OpenAI) -> None:
    def text(**changes: Any) -> str:
        return client.completions.create(**completion_body(max_tokens=20, **changes)).choices[0].text

    assert text(seed=-5) == text(seed=-5) != text(seed=5)
    assert text() != text()  # drawn anew where none is given
    assert text(temperature=0) == text(temperature=0, seed=9)


def test_answers_held_to_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    out = client.chat.completions.create(**chat_body(max_tokens=60, response_format=named))
    assert isinstance(json.loads(out.choices[0].message.content or "")["a"], bool)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**chat_body(response_format=bad))
    assert error.value.param == "response_format"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"functions": []}, "functions"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tools": []}, "tools"),
        ({"invented": 1}, "invented"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_001}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "stranger", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_supported_is_named(server: Server, changes: dict[str, Any], param: str) -> None:
    status, _, answer = server.post("/v1/chat/completions", chat_body(**changes))
    assert status == 400, answer
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", param)
    assert param in answer["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_a_completion_refuses(server: Server, changes: dict[str, Any], param: str) -> None:
    status, _, answer = server.post("/v1/completions", completion_body(**changes))
    assert (status, answer["error"]["param"]) == (400, param)


def test_errors_are_the_client_s_own(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**chat_body(n=-1))
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(**chat_body(tools=[{"type": "function", "function": {"name": "f"}}]))
    assert (unknown.value.param, unknown.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**chat_body(model="gpt"))
    assert missing.value.code == "model_not_found"
    assert client.chat.completions.create(**chat_body(n=1, stop=None, max_tokens=1)).choices


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1" * 6000, b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"null", b'"text"', b"\x00"],
)
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = server.request("POST", path, body)
        assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")


def test_numbers_that_are_none(server: Server) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"model": "bundle", "prompt": "a", "temperature": {number}}}'
        assert server.request("POST", "/v1/completions", body.encode())[0] == 400


def test_other_content_types_paths_and_methods(server: Server) -> None:
    body = json.dumps(completion_body()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", ""):
        assert server.request("POST", "/v1/completions", body, Content_Type=kind)[0] == 415
    assert server.request("POST", "/v1/completions", body, Content_Type="Application/JSON; charset=utf-8")[0] == 200
    assert server.request("POST", "/v1/completions", gzip.compress(body), Content_Encoding="gzip")[0] == 415
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/completions", 405),
        ("HEAD", "/v1/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("DELETE", "/v1/models/bundle", 405),
        ("PUT", "/", 405),
        ("FOO", "/health", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/a%00%ff/b", 404),
        ("GET", "/docs", 404),
        ("GET", "//v1/models", 404),
        ("OPTIONS", "*", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/" + "a" * 10_000, 404),
        ("GET", "http://localhost/health", 404),
    ],
)
def test_other_paths_and_methods(server: Server, method: str, path: str, expected: int) -> None:
    status, headers, answer = server.request(method, path, b"{}" if method == "POST" else None)
    assert (status, headers["content-type"]) == (expected, "application/json")
    if status == 405:
        assert headers["allow"] in ("GET", "POST")
    if method == "HEAD":
        assert answer == b""
        return
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_slashes_and_heads(server: Server) -> None:
    for path in ("/v1/models", "/v1/models/bundle", "/health", "/", "/metrics", "/openapi.json"):
        status, headers, answer = server.request("GET", path)
        assert status == 200
        assert server.request("GET", path + "/")[0] == 200
        assert server.request("GET", path + "?a=%00")[0] == 200
        head_status, head_headers, nothing = server.request("HEAD", path)
        assert (head_status, nothing) == (200, b"")
        assert head_headers["content-type"] == headers["content-type"]
        assert answer
    assert server.post("/v1/completions/", completion_body())[0] == 200


def test_the_host_is_this_machine(server: Server, bundle: Path) -> None:
    port = server.port
    for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.request("GET", "/v1/models", Host=host)[0] == 200
    for host in ("example.org", "localhost.example.org", "127.0.0.1.nip.io", "[::1", "", "a b", "evil@", "192.168.0.1"):
        status, _, answer = server.request("GET", "/v1/models", Host=host)
        assert (status, json.loads(answer)["error"]["code"]) == (403, "host_not_allowed")
    with serving(bundle, "--allow-host", "Example.org") as behind_proxy:
        assert behind_proxy.request("GET", "/health", Host="example.org:443")[0] == 200
        assert behind_proxy.request("GET", "/health", Host="localhost")[0] == 200
        assert behind_proxy.request("GET", "/health", Host="www.example.org")[0] == 403
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{behind_proxy.port}/v1", api_key="none", default_headers={"Host": "evil.test"}
        )
        with client, pytest.raises(openai.PermissionDeniedError):
            client.models.list()


def test_a_large_body_is_refused(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(**completion_body(prompt="a" * 10_000_000))
    assert error.value.status_code == 413
    with server.socket() as s:  # announced, and never sent
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000000\r\n\r\n")
        assert b" 413 " in s.recv(1000)
    assert server.post("/v1/completions", completion_body())[0] == 200


def test_a_prompt_has_a_limit(bundle: Path) -> None:
    with serving(bundle, "--max-prompt-tokens", "100", "--max-body-bytes", "2000") as server:
        assert server.post("/v1/completions", completion_body(prompt="a" * 100))[0] == 200
        status, _, answer = server.post("/v1/completions", completion_body(prompt="a" * 101))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        messages = [{"role": "user", "content": "a" * 100}]
        assert server.post("/v1/chat/completions", chat_body(messages=messages))[2]["error"]["param"] == "messages"
        assert server.post("/v1/completions", completion_body(prompt="a" * 2000))[0] == 413


def test_keys(bundle: Path) -> None:
    with serving(bundle, LOCOCO_API_KEY="secret") as server:
        for key in ("wrong", "secret2", "secre"):
            with server.client(key) as client, pytest.raises(openai.AuthenticationError):
                client.models.list()
        for header in ("", "Bearer", "Bearer ", "Basic secret", "secret", "Bearer s\xe9cret"):
            assert server.request("GET", "/v1/models", Authorization=header)[0] == 401
        with server.client("secret") as client:
            assert client.models.list().data
        assert server.request("GET", "/health")[0] == 200


# --- clients that misbehave ------------------------------------------------------------------------------------------


def raw_request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + data


def test_a_client_that_went_away_stops_its_request(server: Server) -> None:
    before = server.metric("lococo_cancelled_total")
    for n, stream in enumerate((True, False)):
        with server.socket() as s:
            s.sendall(raw_request(endless() | {"stream": stream}))
            server.wait_for("lococo_running_requests", 1)
            if stream:
                while b"data: " not in s.recv(1 << 16):
                    pass
        server.wait_for("lococo_running_requests", 0)
        assert server.metric("lococo_cancelled_total") == before + n + 1
    generated = server.metric("lococo_generated_tokens_total")
    time.sleep(0.1)
    assert server.metric("lococo_generated_tokens_total") == generated


def test_a_client_that_closes_its_stream(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        **completion_body(max_tokens=100_000, extra_body={"ignore_eos": True}), stream=True
    )
    next(iter(stream))
    stream.close()
    server.wait_for("lococo_running_requests", 0)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="who half-closes is taken for gone: no TCP_INFO here")
def test_a_client_that_says_no_more_is_answered(server: Server) -> None:
    def answer(data: bytes) -> tuple[int, bytes]:
        with server.socket() as s:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            with contextlib.closing(http.client.HTTPResponse(s)) as response:
                response.begin()
                body = response.read()
            assert s.recv(1) == b""
            return response.status, body

    status, body = answer(raw_request(completion_body(seed=1)))
    assert (status, json.loads(body)["choices"][0]["finish_reason"]) == (200, "length")
    slow = completion_body(max_tokens=1000, ignore_eos=True)  # is asked whether it is still there
    assert json.loads(answer(raw_request(slow))[1])["usage"]["completion_tokens"] == 1000
    status, body = answer(raw_request({**slow, "stream": True}))
    assert (status, body[-14:]) == (200, b"data: [DONE]\n\n")
    assert answer(raw_request(completion_body(n=0)))[0] == 400
    assert answer(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == (200, b'{"status":"ok"}')
    for unfinished in (raw_request(completion_body())[:-10], b"POST /v1/completions HTTP/1.1\r\nContent-Le", b"GE"):
        status, body = answer(unfinished)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
    assert server.post("/v1/completions", completion_body())[0] == 200


def test_half_closed_and_broken_connections(server: Server) -> None:
    for stream in (True, False):
        with server.socket() as s:
            s.sendall(raw_request(endless() | {"stream": stream}))
            s.shutdown(socket.SHUT_WR)
            server.wait_for("lococo_running_requests", 1)
        server.wait_for("lococo_running_requests", 0)  # now it has gone
    with server.socket() as s:
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1) == b""
    with server.socket() as s:
        s.sendall(raw_request(completion_body())[:-10])  # half a body
    with server.socket() as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Le")
    assert server.post("/v1/completions", completion_body())[0] == 200


def answer_to(server: Server, data: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    with server.socket() as s:
        s.sendall(data)
        parts = [s.recv(1 << 16)]
        while parts[-1]:
            parts.append(s.recv(1 << 16))
        return b"".join(parts)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /hea lth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(500), 400),  # TLS
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nbad header: 1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 30_000, 431),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    ],
)
def test_what_is_not_http_is_refused(server: Server, data: bytes, status: int) -> None:
    head, _, body = answer_to(server, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert server.post("/v1/completions", completion_body())[0] == 200


def test_slow_headers_are_given_up(server: Server) -> None:
    """A connection that trickles its headers, or sends none, ends; others are served meanwhile."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with server.socket() as silent, server.socket() as trickling, server.socket() as second:
        second.sendall(head + b"\r\n")
        assert b" 200 " in second.recv(1000)
        second.sendall(head)  # half of another request
        trickling.sendall(head)
        with contextlib.suppress(OSError):
            for _ in range(40):
                assert server.request("GET", "/health")[0] == 200
                trickling.sendall(b"a: b\r\n")
                time.sleep(0.1)
        assert silent.recv(1000) == b""
        assert b" 408 " in second.recv(1000)
        with contextlib.suppress(ConnectionResetError):  # it went on sending
            assert b" 408 " in trickling.recv(1000)


def test_connections_have_a_limit(bundle: Path) -> None:
    with serving(bundle, "--max-connections", "2") as server:
        with server.socket(), server.socket():
            with server.client() as client, pytest.raises(openai.InternalServerError) as error:
                client.models.list()
            assert error.value.code == "too_many_connections"
        for _ in range(100):
            if server.request("GET", "/health")[0] == 200:
                break
            time.sleep(0.1)  # it takes note of the closed ones
        else:
            pytest.fail("the server takes no connection any more")


def test_a_body_that_goes_on_after_its_answer_is_given_up(server: Server) -> None:
    with server.socket() as s:
        s.sendall(b"PUT /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert b" 405 " in s.recv(1000)
        with contextlib.suppress(OSError):
            for _ in range(50):
                s.sendall(b"a")
                time.sleep(0.1)
            pytest.fail("the connection is still open")


def test_several_requests_on_one_connection(server: Server) -> None:
    """Sent at once, and answered in their order."""
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /heaven HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    data = answer_to(server, raw_request(completion_body()) + health * 2 + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"200", b"200", b"404"]


def test_a_slow_body_is_given_up(server: Server) -> None:
    request = raw_request(completion_body())
    with server.socket() as s:
        s.sendall(request[:-10])
        assert b" 408 " in s.recv(1000)
    assert server.post("/v1/completions", completion_body())[0] == 200


def test_a_client_that_reads_nothing_keeps_its_session_no_longer_than_allowed(bundle: Path) -> None:
    with serving(bundle, "--sessions", "1", "--timeout", "2", "--max-new-tokens", "100000") as server:
        with server.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(raw_request(endless(logprobs=20)))
            server.wait_for("lococo_running_requests", 1)
            assert server.post("/v1/completions", completion_body())[0] in (200, 504)
            server.wait_for("lococo_running_requests", 0)
        assert server.post("/v1/completions", completion_body())[0] == 200


# --- many at once ----------------------------------------------------------------------------------------------------


def test_concurrent_streams_equal_solo_runs(server: Server, client: openai.OpenAI) -> None:
    def stream(i: int) -> str:
        body = completion_body(prompt=f"{i} is a number", max_tokens=40, seed=i, stream=True)
        if i % 2:
            body = chat_body(messages=[{"role": "user", "content": f"Say {i}"}], max_tokens=40, seed=i, stream=True)
            return "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**body))
        return "".join(c.choices[0].text for c in client.completions.create(**body))

    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(stream, range(32)))
    assert together == [stream(i) for i in range(32)]
    assert len(set(together)) == 32


@pytest.fixture(scope="module")
def batched_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_text(tmp_path_factory.mktemp("batched") / "bundle", batch=4)


def test_sessions_stepped_together_answer_as_alone(batched_bundle: Path) -> None:
    """Clients come, go away in the middle, and read slowly; the others' answers are what they are alone."""
    with serving(batched_bundle, "--max-new-tokens", "100000") as server, server.client() as client:

        def text(i: int, alone: bool = False) -> str:
            body = completion_body(prompt=f"{i} is a number", max_tokens=60, seed=i, stream=True)
            if i % 3 == 0:
                with server.socket() as s:
                    s.sendall(raw_request(endless(prompt=f"{i} goes away")))
                    while b"data: " not in s.recv(1 << 16):
                        pass
                if alone:
                    server.wait_for("lococo_running_requests", 0)
            return "".join(c.choices[0].text for c in client.completions.create(**body))

        alone = [text(i, alone=True) for i in range(16)]
        assert len(set(alone)) == 16
        assert server.metric('lococo_step_sessions_bucket{le="1.0"}') == server.metric("lococo_step_sessions_count")
        with ThreadPoolExecutor(16) as threads, server.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(raw_request(endless(logprobs=20)))  # and reads nothing
            assert list(threads.map(text, range(16))) == alone
            together = server.metric("lococo_step_sessions_sum") / server.metric("lococo_step_sessions_count")
            assert together > 1
        server.wait_for("lococo_running_requests", 0)
        assert server.metric('lococo_step_sessions_bucket{le="4.0"}') == server.metric("lococo_step_sessions_count")
        messages: list[Any] = []
        next_turn(client, messages)
        assert next_turn(client, messages).prompt_tokens_details.cached_tokens > 0
        assert server.stop() == 0
    with serving(batched_bundle, "--no-batch", "--sessions", "5") as server:
        assert server.post("/v1/completions", completion_body())[0] == 200
        assert server.metric("lococo_step_sessions_count") == 0
    with (
        pytest.raises(RuntimeError, match=r"sessions: expected at most 4, .* got 5"),
        serving(batched_bundle, "--sessions", "5"),
    ):
        pass


def test_a_step_that_fails_is_of_one_session(batched_bundle: Path) -> None:
    metrics = Metrics()
    with LLM(batched_bundle) as llm, contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(llm.model.session()) for _ in range(4)]
        shared = SharedSteps(Batch(llm.model), metrics)
        stack.callback(shared.close)
        for session in sessions:
            session.prefill([1, 2, 3])
        sessions[1].cancel()
        ids = [5, 6, 999, 7]
        with ThreadPoolExecutor(4) as threads:
            steps = [threads.submit(shared.step, *each) for each in zip(sessions, ids, strict=True)]
            found = [step.exception() for step in steps]
        assert [type(e) for e in found] == [type(None), CancelledError, TokenIdError, type(None)]
        assert [session.position for session in sessions] == [4, 3, 3, 4]
        for session in sessions:
            shared.leave(session)
        alone = stack.enter_context(llm.model.session())
        alone.prefill([1, 2, 3])
        assert np.allclose(alone.step(7), sessions[3].logits(), atol=1e-4)


def test_the_queue_is_bounded(bundle: Path) -> None:
    options = ("--sessions", "1", "--max-queue", "1", "--max-new-tokens", "100000")
    with serving(bundle, *options) as server, server.client() as client, server.socket() as running:
        running.sendall(raw_request(endless()))
        server.wait_for("lococo_running_requests", 1)
        with server.socket() as waiting:
            waiting.sendall(raw_request(endless()))
            server.wait_for("lococo_waiting_requests", 1)
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(**completion_body())
            assert int(error.value.response.headers["retry-after"]) >= 1
        server.wait_for("lococo_waiting_requests", 0)  # it went away
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(client.completions.create, **completion_body())
            server.wait_for("lococo_waiting_requests", 1)
            running.close()
            assert answer.result().choices
        assert len(client.completions.create(**completion_body(n=7)).choices) == 7  # one after the other


def test_time_is_limited(bundle: Path) -> None:
    options = ("--sessions", "1", "--timeout", "1", "--max-new-tokens", "100000")
    body = completion_body(max_tokens=100_000, logit_bias=LETTERS)
    with serving(bundle, *options) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**body)
        assert error.value.status_code == 504
        stream = client.completions.create(**body, stream=True)
        with pytest.raises(openai.APIError, match="more than 1 s"):
            list(stream)
        assert client.completions.create(**completion_body()).choices


def test_sigterm_drains(bundle: Path) -> None:
    with serving(bundle, "--sessions", "1") as server, server.client() as client, ThreadPoolExecutor(3) as threads:
        body = completion_body(max_tokens=1000, logit_bias=LETTERS, seed=1)
        expected = client.completions.create(**body).choices[0].text
        answers = [threads.submit(client.completions.create, **body) for _ in range(3)]
        server.wait_for("lococo_waiting_requests", 2)
        assert server.stop() == 0
        assert [answer.result().choices[0].text for answer in answers] == [expected] * 3
        assert len(expected) == 1000


def test_draining_has_a_limit(bundle: Path) -> None:
    """Then those that run, and those that wait, get an error."""
    options = ("--sessions", "1", "--drain-timeout", "1", "--max-new-tokens", "100000")
    body = completion_body(max_tokens=100_000, logit_bias=LETTERS)
    with serving(bundle, *options) as server, server.client() as client, ThreadPoolExecutor(2) as threads:
        stream = client.completions.create(**body, stream=True)
        next(iter(stream))
        running = threads.submit(list, stream)
        waiting = threads.submit(client.completions.create, **body)
        server.wait_for("lococo_waiting_requests", 1)
        assert server.stop() == 0
        with pytest.raises(openai.APIError, match="shutting down"):
            running.result()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            waiting.result()
        assert not [line for line in server.lines if "Traceback" in line]


# --- conversations ---------------------------------------------------------------------------------------------------


def next_turn(client: openai.OpenAI, messages: list[Any], **changes: Any) -> Any:
    """Says something more; messages grow by that and by the answer."""
    messages.append({"role": "user", "content": f"turn {len(messages)}"})
    out = client.chat.completions.create(**chat_body(messages=messages, logit_bias=LETTERS, seed=1, **changes))
    messages.append({"role": "assistant", "content": out.choices[0].message.content})
    return out.usage


def test_a_conversation_goes_on_from_its_snapshot(client: openai.OpenAI, server: Server) -> None:
    messages: list[Any] = [{"role": "system", "content": "This begins the test of snapshots."}]
    read = 0
    for _ in range(4):
        usage = next_turn(client, messages, max_tokens=20)
        assert usage.prompt_tokens_details.cached_tokens == read
        read = usage.total_tokens - 1  # all but the last token
    earlier = messages[:3]  # another branch of it: the state of an earlier turn is still there
    assert next_turn(client, earlier).prompt_tokens_details.cached_tokens > 0
    fresh = next_turn(client, messages[:-2], extra_body={"cache_prompt": False})
    assert fresh.prompt_tokens_details.cached_tokens == 0
    stranger = [{"role": "system", "content": "This begins another test."}, *messages[1:-2]]
    assert next_turn(client, stranger).prompt_tokens_details.cached_tokens == 0


def test_an_answer_is_what_one_session_says(client: openai.OpenAI, llm: LLM) -> None:
    """A continued conversation equals the runtime's own, turn by turn."""
    from lococo_runtime import Chat

    biases = {int(i): 100.0 for i in LETTERS}
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=20, logit_bias=biases)
    messages: list[Any] = []
    with Chat(llm) as chat:
        for turn in range(5):
            next_turn(client, messages, max_tokens=20)
            assert messages[-1]["content"] == chat.send(f"turn {2 * turn}", sampling).text


def test_kept_conversations_have_a_limit(bundle: Path) -> None:
    with serving(bundle, "--keep", "2") as server, server.client() as client:
        talks: list[list[Any]] = [[{"role": "system", "content": f"Talk {i}"}] for i in range(4)]
        for talk in talks:
            next_turn(client, talk)
        assert server.metric("lococo_snapshots") == 2
        assert next_turn(client, talks[3]).prompt_tokens_details.cached_tokens > 0
        assert next_turn(client, talks[0]).prompt_tokens_details.cached_tokens == 0
    with serving(bundle, "--keep", "0") as server, server.client() as client:
        next_turn(client, talks[0])
        assert next_turn(client, talks[0]).prompt_tokens_details.cached_tokens == 0


def test_states_of_others_are_let_alone(bundle: Path, llm: LLM, tmp_path: Path) -> None:
    with SessionPool(llm.model, tmp_path, max_sessions=1) as pool, pool.acquire("mine") as session:
        session.prefill([1, 2, 3])
    with serving(bundle, "--keep", "1", "--state-dir", str(tmp_path)) as server, server.client() as client:
        for _ in range(2):
            next_turn(client, [])
        assert server.stop() == 0
    with SessionPool(llm.model, tmp_path, max_sessions=1) as pool:
        assert len(pool.sessions()) == 2
        assert "mine" in pool


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kept_conversations_survive_the_process(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = ("--state-dir", str(tmp_path / "states"), "--sessions", "1")
    talks: list[list[Any]] = [[{"role": "system", "content": f"Talk {i}"}] for i in range(4)]
    with serving(bundle, *options) as server, server.client() as client:
        for talk in talks:
            next_turn(client, talk)
        server.stop(number)
    with serving(bundle, *options) as server, server.client() as client:
        for talk in talks:
            usage = next_turn(client, talk)
            assert usage.prompt_tokens_details.cached_tokens > 30


def test_a_damaged_state_is_forgotten(bundle: Path, tmp_path: Path) -> None:
    talk: list[Any] = []
    with serving(bundle, "--state-dir", str(tmp_path)) as server, server.client() as client:
        next_turn(client, talk)
    for file in tmp_path.glob("*.state"):
        file.write_bytes(file.read_bytes()[:-100])
    with serving(bundle, "--state-dir", str(tmp_path)) as server, server.client() as client:
        assert next_turn(client, talk).prompt_tokens_details.cached_tokens == 0
        assert server.metric("lococo_snapshot_errors_total") == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_threads_keep_and_use_conversations(llm: LLM, tmp_path: Path, on_disk: bool) -> None:
    """More of them than are kept, so that they are also forgotten all the time."""
    metrics, keep = Metrics(), 3
    directory = tmp_path / "states" if on_disk else None
    snapshots = Snapshots(llm, keep=keep, directory=directory, in_memory=2, metrics=metrics)
    prompts = [f"<|im_start|>user\nThis is talk number {i}.<|im_end|>\n" for i in range(6)]

    def talk(seed: int) -> int:
        order, found = np.random.default_rng(seed), 0
        with llm.model.session() as session:
            for number in order.integers(0, len(prompts), 40):
                text = prompts[number]
                ids = llm.encode(text, add_special_tokens=False)
                read, rest = ids[:-1], ids[-1:]
                origin = snapshots.load(session, ids, text, None)
                if origin is None:
                    session.reset()
                    session.prefill(read)
                    snapshots.save(session, Origin(None, [], b"", ids), read)
                else:
                    found += 1
                    assert origin.rest == rest
                assert session.position == len(read)
        return found

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(talk, range(8)))
    assert sum(found) > 0
    assert metrics.snapshot_errors._value.get() == 0
    assert metrics.snapshots._value.get() <= keep
    snapshots.close()
    if directory is not None:
        assert 0 < len(list(directory.glob("*.state"))) <= keep


# --- packs -----------------------------------------------------------------------------------------------------------


def test_packs(bundle: Path, llm: LLM, tmp_path: Path) -> None:
    """A model of its own for each pack: prompts are read behind it, and conversations go on behind it too."""
    for name in ("a", "b"):
        with llm.model.session() as session:
            session.prefill(llm.encode(f"The manual of {name}. " * 20))
            session.save(tmp_path / name)
            read = session.position
    options = ["--pack", f"first={tmp_path / 'a'}", "--pack", f"second={tmp_path / 'b'}"]
    options += ["--state-dir", str(tmp_path / "states")]
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    with serving(bundle, *options) as server, server.client() as client:
        models = {model.id: model.model_dump()["num_read"] for model in client.models.list()}
        assert models == {"bundle": 0, "bundle:first": read, "bundle:second": read}
        assert client.models.retrieve("bundle:first").id == "bundle:first"
        for prompt in (" Question?", ""):
            for name, file in (("first", "a"), ("second", "b")):
                with llm.model.session() as session:
                    session.load(tmp_path / file)
                    expected = llm.generate(prompt, sampling, session=session)
                body = completion_body(model=f"bundle:{name}", prompt=prompt, seed=3, max_tokens=20)
                out = client.completions.create(**body, extra_body={"ignore_eos": True})
                assert out.choices[0].text == expected.text
                assert out.usage is not None
                assert out.usage.prompt_tokens == expected.num_prompt_tokens == read + len(prompt)
        talks: dict[str, list[Any]] = {name: [] for name in models}
        for name in models:
            usage = next_turn(client, talks[name], model=name)
            assert usage.prompt_tokens_details.cached_tokens == models[name]
        server.stop(signal.SIGKILL)
    with serving(bundle, *options) as server, server.client() as client:
        for name in models:  # another pack's conversation of the same words is another conversation
            usage = next_turn(client, talks[name], model=name)
            assert usage.prompt_tokens_details.cached_tokens > models[name] + 20
        for path in ("nothing", "first/../second", str(tmp_path / "a")):
            with pytest.raises(openai.NotFoundError, match="bundle:first or bundle:second"):
                client.completions.create(**completion_body(model=f"bundle:{path}"))
    (tmp_path / "b").write_bytes(b"no state")
    for wrong in (
        f"second={tmp_path / 'b'}",
        "second=missing",
        "=file",
        "name=",
        "a:b=file",
        f"first={tmp_path / 'a'}",
    ):
        with pytest.raises(RuntimeError, match=r"state|No such|not found|NAME=FILE|once"):
            Server(bundle, *options[:2], "--pack", wrong)


# --- its own description ----------------------------------------------------------------------------------------------


def test_the_description(server: Server, llm: LLM) -> None:
    described = json.loads(server.request("GET", "/openapi.json")[2])
    assert set(described["paths"]) == {
        "/v1/models",
        "/v1/models/{name}",
        "/v1/completions",
        "/v1/chat/completions",
        "/health",
        "/metrics",
    }
    chat = described["components"]["schemas"]["ChatRequest"]
    assert chat["properties"]["model"]["enum"] == ["bundle"]
    assert chat["additionalProperties"] is False
    assert "422" not in json.dumps(described)


def test_the_description_says_what_goes_with_what(server: Server) -> None:
    """What it refuses the server refuses, and what it takes the server takes."""
    jsonschema = pytest.importorskip("jsonschema")
    described = json.loads(server.request("GET", "/openapi.json")[2])
    schema = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
    both: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"n": 2.0, "seed": -1.0, "max_tokens": 3.0, "stop_token_ids": [5.0]}, True),  # JSON has one kind of number
        ({"n": 1.5}, False),
        ({"n": 129}, False),
        ({"stop": "x", "logit_bias": {"0": 1, "259": -1}, "store": False}, True),
        ({"store": 0}, False),
        ({"store": True}, False),
        ({"stop": ""}, False),
        ({"stop": ["a"] * 65}, False),
        ({"stop": "\0"}, False),
        ({"logit_bias": {"260": 1}}, False),
        ({"logit_bias": {"07": 1}}, False),
        ({"logit_bias": {"x": 1}}, False),
        ({"stream_options": {"include_usage": True}}, False),
        ({"stream_options": {"include_usage": True}, "stream": True}, True),
        ({"repetition_penalty": 0.001}, False),
    ]
    texts: list[tuple[dict[str, Any], bool]] = [
        ({"prompt": ""}, False),
        ({"prompt": []}, False),
        ({"prompt": [[]]}, False),
        ({"prompt": [[1.0], [2]]}, True),
        ({"prompt": [260]}, False),
        ({"prompt": ["a"] * 257}, False),
        ({"prompt": [5] * 257}, True),
        ({"echo": True, "logprobs": 1}, False),
        ({"echo": False, "logprobs": 1}, True),
        ({"best_of": 1}, True),
        ({"best_of": 1, "n": 2}, False),
    ]
    chats: list[tuple[dict[str, Any], bool]] = [
        ({"top_logprobs": 1}, False),
        ({"top_logprobs": 1, "logprobs": True}, True),
        ({"max_tokens": 1, "max_completion_tokens": 2}, False),
        ({"max_tokens": None, "max_completion_tokens": 2}, True),
        ({"chat_template_kwargs": {"tools": []}}, False),
        ({"chat_template_kwargs": {"mine": []}}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": schema}, True),
        ({"response_format": {**schema, "type": "text"}}, False),
        ({"response_format": {"type": "json_schema"}}, False),
    ]
    for path, name, body, cases in (
        ("completions", "CompletionRequest", completion_body(), both + texts),
        ("chat/completions", "ChatRequest", chat_body(), both + chats),
    ):
        reference = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        validator = jsonschema.Draft202012Validator(reference)
        for changes, taken in cases:
            assert validator.is_valid({**body, **changes}) == taken, changes
            status = server.request("POST", f"/v1/{path}", json.dumps({**body, **changes}).encode())[0]
            assert (status == 200) == taken, changes


def test_a_completion_s_default_length_keeps_to_the_limit(bundle: Path) -> None:
    with serving(bundle, "--max-new-tokens", "8") as server, server.client() as client:
        out = client.completions.create(model="bundle", prompt="Hello", extra_body={"ignore_eos": True})
        assert out.usage is not None
        assert out.usage.completion_tokens == 8


def test_answers_keep_to_the_description(bundle: Path) -> None:
    """schemathesis, briefly; `scripts/fuzz 600 http` is the long version."""
    with serving(bundle, "--max-new-tokens", "8", "--sessions", "2") as server:
        result = fuzz_http.schemathesis(f"http://127.0.0.1:{server.port}", "--max-examples=30", "--seed=1")
        assert result.returncode == 0, result.stdout
        for path in ("completions", "chat/completions"):
            assert server.metric(f'lococo_responses_total{{path="/v1/{path}",status="200"}}') > 0
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


def test_the_metrics_are_prometheus_s(server: Server) -> None:
    status, headers, data = server.request("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = {family.name: family for family in text_string_to_metric_families(data.decode())}
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families.values())
    assert families["lococo_generated_tokens"].samples[0].name == "lococo_generated_tokens_total"


# --- under load -----------------------------------------------------------------------------------------------------


def test_the_load_test(batched_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    command = [sys.executable, str(ROOT / "scripts" / "load_test.py"), str(batched_bundle), "--clients", "8"]
    command += ["--seconds", "1", "--max-tokens", "8", "--requests", "5", "--chat", "-o", str(output)]
    result = subprocess.run([*command, "--", "--threads", "1"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(output.read_text())
    assert (report["errors"], report["end_errors"]) == (0, [])
    assert report["answers"] >= 8
    assert report["mean_step_sessions"] > 1
    assert report["first_token_ms"]["p50"] <= report["first_token_ms"]["p99"]
    assert report["rss_anon_bytes"]
