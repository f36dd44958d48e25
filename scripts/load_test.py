"""Many streaming clients at once on lococo-serve, each answer held to the same request alone; prints JSON.

    python scripts/load_test.py bundle/ --clients 200 --seconds 60 [--chat] [-- flags of lococo-serve]
    python scripts/load_test.py --url http://127.0.0.1:8000 --pid PID

With a bundle it starts the server and then tests its end too: SIGTERM, where every answer that has begun must be
finished; kill -9 and another start, where every conversation must go on from its kept state.

Times are in milliseconds: to the first token from the request, queue included, and between tokens. It fails on an
error, on an answer that differs, and where the server's own memory (RssAnon) has grown by more than 16 MiB in the last
three quarters of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from lococo_bench.device import cpu_name, open_device
from lococo_bench.measure import build_commit

GROWTH_BYTES = 16 << 20
KEY = os.environ.get("LOCOCO_API_KEY", "none")


@dataclass
class Answer:
    """A stream as it came: text, when each token did (ms from the request on), and the usage."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)


class LoadError(Exception):
    """An answer that is none."""


@dataclass
class Target:
    """A server and what is asked of it."""

    url: str
    chat: bool
    max_tokens: int
    model: str = ""

    def __post_init__(self) -> None:
        request = urllib.request.Request(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as answer:
            self.model = json.load(answer)["data"][0]["id"]

    def body(self, i: int) -> dict[str, Any]:
        """The request with number i."""
        prompt = f"Write a story about the number {i}."
        if self.chat:
            return {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "seed": i}
        return {"prompt": prompt, "logprobs": 0, "seed": i}

    async def ask(self, body: dict[str, Any], begun: asyncio.Event | None = None) -> Answer:
        """Streams an answer, token by token. Reads HTTP itself: the openai client takes more time than the server."""
        common = {"model": self.model, "max_tokens": self.max_tokens, "stream": True}
        data = json.dumps({**common, "stream_options": {"include_usage": True}, **body}).encode()
        parts = urlsplit(self.url)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        answer = Answer()
        try:
            writer.write(head.encode() + data)
            status = await reader.readline()
            if b" 200 " not in status:
                raise LoadError((status + await reader.read(1000)).decode())
            while line := await reader.readline():
                if not line.startswith(b"data: "):  # headers and lengths of chunks
                    continue
                if line == b"data: [DONE]\n":
                    return answer
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise LoadError(event["error"]["message"])
                answer.usage = event["usage"] or {}
                for choice in event["choices"]:
                    answer.text += choice["delta"].get("content", "") if self.chat else choice["text"]
                    if choice["logprobs"]:
                        answer.times.append((time.perf_counter() - start) * 1e3)
                if begun is not None:
                    begun.set()
            raise LoadError("the stream broke off")
        finally:
            writer.close()


def resident_bytes(pid: int) -> int:
    """Memory of a process that is no file's (RssAnon)."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def cpu_seconds(pid: int) -> float:
    """Of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    return {name: round(float(np.percentile(values, q)), 3) for name, q in (("p50", 50), ("p99", 99)) if values}


async def load(target: Target, clients: int, seconds: float, alone: list[str], pid: int | None) -> dict[str, Any]:
    """All clients ask one request after the other until the time is up; the report."""
    first, between, errors = [], [], []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        i = number
        while time.monotonic() < end:
            try:
                answer = await target.ask(target.body(i % len(alone)))
            except (LoadError, OSError) as e:
                errors.append(f"{type(e).__name__}: {e}")
                await asyncio.sleep(0.1)
                continue
            if not answer.times:
                errors.append(f"request {i % len(alone)}: no token")
                continue
            if answer.text != alone[i % len(alone)]:
                errors.append(f"request {i % len(alone)}: expected {alone[i % len(alone)]!r}, got {answer.text!r}")
            first.append(answer.times[0])
            between.extend(np.diff(answer.times).tolist())
            i += clients + 1

    memory: list[int] = []
    began, cpu = time.monotonic(), cpu_seconds(pid) if pid else 0.0
    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.5)
        if pid is not None and time.monotonic() < end:
            memory.append(resident_bytes(pid))
    took = time.monotonic() - began
    tokens = len(first) + len(between)
    report: dict[str, Any] = {
        "clients": clients,
        "seconds": round(took, 1),
        "answers": len(first),
        "tokens": tokens,
        "tokens_per_second": round(tokens / took, 1),
        "errors": len(errors),
        "first_errors": errors[:5],
        "first_token_ms": percentiles(first),
        "between_tokens_ms": percentiles(between),
        "client_cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime, 1),
    }
    if pid is not None:
        settled = memory[len(memory) // 4 :]
        report["server_cpu_seconds"] = round(cpu_seconds(pid) - cpu, 1)
        report["rss_anon_bytes"] = memory[:: max(1, len(memory) // 20)]
        report["grown_bytes"] = settled[-1] - settled[0] if settled else 0
    return report


@contextlib.contextmanager
def serving(bundle: Path, flags: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address and process."""
    command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not (url := process.stdout.readline().strip()):
                raise SystemExit(f"{' '.join(command)} did not start")
            yield url, process
        finally:
            process.kill()


async def drain(target: Target, process: subprocess.Popen[str], alone: list[str]) -> list[str]:
    """SIGTERM while answers are running: errors."""
    begun = [asyncio.Event() for _ in range(min(4, len(alone)))]
    tasks = [asyncio.create_task(target.ask(target.body(i), event)) for i, event in enumerate(begun)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 600)
    process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    found = [answer.text if isinstance(answer, Answer) else repr(answer) for answer in answers]
    errors = [f"after SIGTERM: expected {a!r}, got {b!r}" for a, b in zip(alone, found, strict=False) if a != b]
    code = await asyncio.to_thread(process.wait, 600)
    return errors + [f"exit code {code}"] * (code != 0)


async def converse(target: Target, talks: list[list[dict[str, str]]]) -> list[int]:
    """A turn of every conversation; how much of each prompt had been read before."""
    cached = []
    for talk in talks:
        talk.append({"role": "user", "content": f"Tell me about {len(talk)} houses."})
        # of one token: the state has read the prompt alone, which the next turn repeats whatever the answer's text is
        answer = await target.ask({"messages": talk, "logprobs": True, "seed": 1, "max_tokens": 1})
        talk.append({"role": "assistant", "content": answer.text})
        cached.append(answer.usage["prompt_tokens_details"]["cached_tokens"])
    return cached


async def survive(target: Target, process: subprocess.Popen[str], talks: list[list[dict[str, str]]]) -> None:
    """Some conversations, and then kill -9 while other requests run."""
    await converse(target, talks)
    begun = asyncio.Event()
    running = asyncio.create_task(target.ask(target.body(0), begun))
    await begun.wait()
    process.kill()
    with contextlib.suppress(LoadError, OSError, asyncio.IncompleteReadError):
        await running


def test_ends(args: argparse.Namespace, flags: Sequence[str], alone: list[str]) -> list[str]:
    """SIGTERM and kill -9; errors."""
    with serving(args.bundle, flags) as (url, process):
        errors = asyncio.run(drain(Target(url, args.chat, args.max_tokens), process, alone))
    talks: list[list[dict[str, str]]] = [[{"role": "system", "content": f"You are number {i}."}] for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        kept = [*flags, "--state-dir", folder]
        with serving(args.bundle, kept) as (url, process):
            asyncio.run(survive(Target(url, True, args.max_tokens), process, talks))
        with serving(args.bundle, kept) as (url, process):
            cached = asyncio.run(converse(Target(url, True, args.max_tokens), talks))
    return errors + [f"conversation {i} was lost" for i, count in enumerate(cached) if count == 0]


def shared_steps(url: str) -> tuple[float, float]:
    """How many sessions were stepped in shared forwards so far, and in how many."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        metrics = answer.read().decode()
    names = ("sum", "count")
    total, count = (float(re.findall(rf"^lococo_step_sessions_{name} (\S+)", metrics, re.M)[0]) for name in names)
    return total, count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="to be served; or --url")
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--pid", type=int, help="of that server, for its memory")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32, help="different ones, each asked alone first")
    parser.add_argument("--chat", action="store_true", help="chats instead of completions")
    parser.add_argument("-o", "--output", type=Path, help="also write the report here")
    argv = sys.argv[1:]
    own = argv[: argv.index("--")] if "--" in argv else argv
    flags = argv[len(own) + 1 :]
    args = parser.parse_args(own)
    if (args.bundle is None) == (args.url is None):
        parser.error("expected a bundle or --url")
    with contextlib.ExitStack() as stack:
        url, pid = args.url, args.pid
        if args.bundle is not None:
            flags = ["--max-queue", str(args.clients), *flags]
            url, process = stack.enter_context(serving(args.bundle, flags))
            pid = process.pid
        target = Target(url, args.chat, args.max_tokens)

        async def run() -> tuple[list[str], dict[str, Any]]:
            alone = [(await target.ask(target.body(i))).text for i in range(args.requests)]
            before = shared_steps(url)
            report = await load(target, args.clients, args.seconds, alone, pid)
            total, count = (b - a for a, b in zip(before, shared_steps(url), strict=True))
            return alone, {**report, "mean_step_sessions": round(total / count, 2) if count else None}

        alone, report = asyncio.run(run())
        machine: dict[str, Any] = {"cpu_info": cpu_name(), "cpu_count": os.cpu_count(), "build_commit": build_commit()}
        if "--device" in flags:
            machine |= open_device(flags[flags.index("--device") + 1]).describe()
            if args.bundle is not None:  # directories are named after TensorRT's version and the architecture
                machine["engines"] = sorted(path.name for path in args.bundle.glob("engines/*"))
        about = {"model": target.model, "chat": args.chat, "max_tokens": args.max_tokens, "flags": flags}
        report = {**machine, **about, **report}
    bad = report["errors"] > 0 or report.get("grown_bytes", 0) > GROWTH_BYTES
    if args.bundle is not None:
        report["end_errors"] = test_ends(args, flags, alone)
        bad |= bool(report["end_errors"])
    text = json.dumps(report, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
