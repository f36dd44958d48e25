"""lococo-serve."""

from __future__ import annotations

import argparse
import asyncio
import functools
import ipaddress
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import uvicorn
from lococo_runtime import LLM, InvalidArgumentError
from lococo_runtime.cli import guarded

from .app import create_app
from .connection import Connection
from .engine import Limits

_LAST_SECONDS = 10  # for those whose time to drain is over to take their error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-serve."""
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="lococo-serve",
        usage="%(prog)s [options] bundle",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=27),
        description="Serve a bundle over OpenAI's HTTP interface, and a chat page at /.",
    )
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="0 = any that is free (8000)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (the directory's name)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that clients call this machine by, as behind a proxy; may be repeated",
    )
    parser.add_argument("--api-key", metavar="KEY", help="asked of clients; better in LOCOCO_API_KEY")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="keep conversations on disk, over restarts")
    parser.add_argument(
        "--pack",
        action="append",
        default=[],
        type=_pack,
        metavar="NAME=FILE",
        help="a state file that clients start from as model MODEL:NAME; may be repeated",
    )
    model = parser.add_argument_group("running the model")
    model.add_argument("--device", default="cpu", help="cpu, or cuda:0 and on")
    model.add_argument("--backend", default="onnxruntime", choices=["onnxruntime", "tensorrt"], help="(onnxruntime)")
    model.add_argument("--threads", type=int, default=0, help="0 = one per physical core")
    model.add_argument(
        "--no-batch", dest="batch", action="store_false", help="step each request alone, though the bundle has a batch"
    )
    limits = parser.add_argument_group("limits")

    def limit(flag: str, name: str, kind: type, metavar: str, what: str) -> None:
        value = getattr(default, name)
        limits.add_argument(flag, dest=name, type=kind, default=value, metavar=metavar, help=f"{what} ({value:g})")

    limits.add_argument(
        "--sessions", type=int, metavar="N", help="requests that run at once (8, or as many as are stepped together)"
    )
    limit("--max-queue", "queue", int, "N", "requests that wait; beyond, 429")
    limits.add_argument(
        "--keep", type=int, metavar="N", help="states kept for a next turn (256 with --state-dir, else 16)"
    )
    limit("--max-connections", "connections", int, "N", "at once; beyond, 503")
    limit("--max-body-bytes", "body_bytes", int, "N", "of a request; beyond, 413")
    limit("--head-timeout", "head_seconds", float, "S", "seconds for a request's headers to arrive")
    limit("--body-timeout", "body_seconds", float, "S", "seconds for a body to arrive; beyond, 408")
    limit("--max-prompt-tokens", "prompt_tokens", int, "N", "of a request; beyond, 400")
    limit("--max-new-tokens", "new_tokens", int, "N", "of an answer")
    limit("--timeout", "seconds", float, "S", "seconds for a request; beyond, 504")
    limits.add_argument(
        "--drain-timeout", type=int, default=60, metavar="S", help="seconds for running requests after SIGTERM (60)"
    )
    args = parser.parse_args(argv)
    return guarded(lambda: _serve(args))


def _serve(args: argparse.Namespace) -> int:
    if not args.host:
        raise InvalidArgumentError("--host: expected an address such as 127.0.0.1, or 0.0.0.0 for all, got nothing")
    if args.drain_timeout < 0:
        raise InvalidArgumentError(f"--drain-timeout: expected at least 0, got {args.drain_timeout}")
    api_key = args.api_key or os.environ.get("LOCOCO_API_KEY") or None
    if not api_key and not _is_loopback(args.host):
        print(f"note: others can reach {args.host}, and no key is asked of them; see --api-key", file=sys.stderr)
    limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
    packs = dict(args.pack)
    if len(packs) != len(args.pack):
        raise InvalidArgumentError("--pack: expected each name once")
    llm = LLM(args.bundle, device=args.device, backend=args.backend, num_threads=args.threads)
    app = create_app(
        llm,
        limits=limits,
        model_name=args.model_name or args.bundle.resolve().name,
        api_key=api_key,
        allowed_hosts=_allowed_hosts(args.host, args.allow_host),
        state_dir=args.state_dir,
        packs=packs,
    )
    config = uvicorn.Config(
        app,
        http=cast(
            "type[Connection]", functools.partial(Connection, head_seconds=limits.head_seconds, most=limits.connections)
        ),
        ws="none",
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=args.drain_timeout + _LAST_SECONDS,
        server_header=False,
    )
    # uvicorn sends itself the signal again when it has drained; being asked to end is no failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = _Server(config, args.drain_timeout, app.state.end_all)
    try:
        server.run()
    except SystemExit:  # uvicorn's 3, after it has said why: the address is taken, or not this machine's
        return 1
    return 0 if server.started else 1


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text!r}")
    return int(text)


def _pack(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (re.fullmatch(r"[\w.-]+", name) and equals and file):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, as in manual=manual.lococo, got {text!r}")
    return name, file


class _Server(uvicorn.Server):
    """Prints its address on stdout as soon as it takes requests: for whoever started it with --port 0.

    When it shuts down it calls `end_all` after `drain_seconds`.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float, end_all: Callable[[], object]) -> None:
        super().__init__(config)
        self._drain_seconds, self._end_all = drain_seconds, end_all

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, self._end_all)
        await super().shutdown(sockets)
        timer.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"http://{host}:{port}", flush=True)


def _allowed_hosts(host: str, names: Sequence[str]) -> list[str] | None:
    """This machine's own names and `names`; None allows all, where others are to reach it and no name is given."""
    if not names and not _is_loopback(host):
        return None
    return list(dict.fromkeys(name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *names)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
