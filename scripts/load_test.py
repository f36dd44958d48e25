"""Many streaming clients at once on a running lococo-serve, each answer held to the same request alone; prints JSON.

    lococo-serve bundle --sessions 8 --max-queue 256 &
    python scripts/load_test.py --url http://127.0.0.1:8000 --clients 200 --seconds 60

Times are in milliseconds: to the first token from the request, queue included, and between tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai


@dataclass
class Found:
    """What the clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    first_ms: list[float] = field(default_factory=list)
    between_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def ask(client: openai.OpenAI, model: str, i: int, max_tokens: int) -> tuple[str, list[float]]:
    """The answer to prompt i, and when each of its pieces came, from the request on, in milliseconds."""
    start = time.perf_counter()
    times, pieces = [], []
    stream = client.completions.create(
        model=model, prompt=f"Story number {i}:", max_tokens=max_tokens, seed=i, stream=True, logprobs=0
    )
    for chunk in stream:
        times.append((time.perf_counter() - start) * 1e3)
        pieces.append(chunk.choices[0].text)
    return "".join(pieces), times


def resident_bytes(pid: int) -> int:
    """Memory of the server that is no file's (RssAnon)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    return {name: round(float(np.percentile(values, q)), 3) for name, q in (("p50", 50), ("p99", 99)) if values}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pid", type=int, help="of the server, for its memory")
    args = parser.parse_args()
    key = os.environ.get("LOCOCO_API_KEY", "none")
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=key, max_retries=0, timeout=600)
    model = client.models.list().data[0].id
    alone = {i: ask(client, model, i, args.max_tokens)[0] for i in range(args.clients)}
    found = Found()
    end = time.monotonic() + args.seconds

    def work(i: int) -> None:
        while time.monotonic() < end:
            try:
                text, times = ask(client, model, i, args.max_tokens)
            except openai.OpenAIError as e:
                with found.lock:
                    found.errors.append(f"{type(e).__name__}: {e}")
                continue
            with found.lock:
                if text != alone[i]:
                    found.errors.append(f"client {i}: expected {alone[i]!r}, got {text!r}")
                found.first_ms.append(times[0])
                found.between_ms += np.diff(times).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(args.clients)]
    memory = [] if args.pid is None else [resident_bytes(args.pid)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if args.pid is not None:
            memory.append(resident_bytes(args.pid))
    report = {
        "clients": args.clients,
        "seconds": args.seconds,
        "answers": len(found.first_ms),
        "tokens": len(found.first_ms) + len(found.between_ms),
        "errors": len(found.errors),
        "first_errors": found.errors[:5],
        "first_token_ms": percentiles(found.first_ms),
        "between_tokens_ms": percentiles(found.between_ms),
        "rss_anon_bytes": memory[:: max(1, len(memory) // 20)],
    }
    print(json.dumps(report, indent=1))
    return 1 if found.errors else 0


if __name__ == "__main__":
    sys.exit(main())
