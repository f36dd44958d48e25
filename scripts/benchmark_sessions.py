#!/usr/bin/env python3
"""Memory packs and the session pool on the CPU: what it takes to start, park and resume a session. Writes JSON.

Reads a text once, saving a pack at every length asked for, then starts sessions from each: the length does not show.
Usage: benchmark_sessions.py BUNDLE TEXT_FILE OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lococo_bench.device import cpu_name
from lococo_bench.measure import build_commit, installed_version, summary_ms
from lococo_runtime import Model, SamplingParams, Session, SessionPool
from lococo_runtime._process import memory_bytes
from lococo_runtime.llm import load_tokenizer

SAMPLES = 40
T = TypeVar("T")


class Timer:
    """Wall and processor time of calls, in milliseconds; other processes disturb the second less."""

    def __init__(self) -> None:
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []

    def __call__(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        result = call(*args, **kwargs)
        self.wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
        self.cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
        return result

    def summary(self) -> dict[str, Any]:
        return {"wall_ms": summary_ms(self.wall_ms), "cpu_ms": summary_ms(self.cpu_ms)}


def start(model: Model, pack: Path) -> Session:
    """From nothing to a session that has read the document."""
    session = model.session()
    session.load(pack)
    return session


def measure_pack(model: Model, pack: Path, tokens: int) -> dict[str, Any]:
    """What a pack weighs, and how long until a session goes on from it."""
    starting, first_token = Timer(), Timer()
    for _ in range(SAMPLES):
        with starting(start, model, pack) as session:
            if session.position != tokens:
                raise SystemExit(f"{pack}: position: expected {tokens}, got {session.position}; remove it")
            first_token(session.generate_all, [], SamplingParams(max_tokens=2, ignore_eos=True))
    nbytes = pack.stat().st_size
    return {
        "document_tokens": tokens,
        "pack_bytes": nbytes,
        "pack_to_state_bytes": nbytes / model.state_bytes,
        "start": starting.summary(),
        "first_step": first_token.summary(),
    }


def measure_pool(model: Model, pack: Path, folder: Path) -> dict[str, Any]:
    """Acquiring in memory, from disk, and with another session parked on the way; writing one."""
    budget = 4
    in_memory, parking, resuming, flush = Timer(), Timer(), Timer(), Timer()
    with SessionPool(model, folder / "pool", max_sessions=budget) as pool:
        for i in range(budget):
            pool.acquire(f"{i}", start=pack).close()
        for i in range(SAMPLES):
            in_memory(pool.acquire, f"{i % budget}").close()
        for i in range(SAMPLES):
            parking(pool.acquire, f"{i + budget}", start=pack).close()
        for i in range(SAMPLES):
            pool.flush()  # nothing is left to be written on the way
            resuming(pool.acquire, f"{i}").close()
            flush(pool.flush)
    return {
        "max_sessions": budget,
        "acquire_in_memory": in_memory.summary(),
        "acquire_parked": resuming.summary(),
        "acquire_from_pack_parking_another": parking.summary(),
        "flush_one": flush.summary(),
    }


def measure_memory(model: Model, pack: Path) -> dict[str, Any]:
    """Private memory of ten sessions that have read blocks and single tokens, against what was promised."""
    with model.session() as session:  # graphs are loaded at their first run, and belong to the model
        session.prefill([5] * (2 * model.manifest.cache.block_size))
    before = memory_bytes("RssAnon")
    sessions = [model.session() for _ in range(10)]
    for session in sessions:
        session.load(pack)
        session.prefill([5] * (2 * model.manifest.cache.block_size))
        for _ in range(20):
            session.step(5)
    taken = (memory_bytes("RssAnon") - before) / len(sessions)
    for session in sessions:
        session.close()
    return {"session_bytes": model.session_bytes, "private_bytes_a_session": taken}


def make_packs(model: Model, ids: list[int], lengths: list[int], folder: Path) -> None:
    """One reading of `ids`, with a pack at every length that the folder lacks."""
    done = 0
    with model.session() as session:
        for length in lengths:
            pack = folder / f"{length}.lococo"
            if pack.exists():
                session.load(pack)
            else:
                begin = time.perf_counter()
                session.prefill(ids[done:length])
                session.save(pack)
                print(f"read {length - done:,} tokens in {time.perf_counter() - begin:.1f} s", flush=True)
            done = length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="document lengths")
    parser.add_argument("--packs", type=Path, help="folder that keeps the packs; those there are not read again")
    parser.add_argument("--threads", type=int, default=0, help="0 = one per physical core (default)")
    args = parser.parse_args()

    text = load_tokenizer(args.bundle).encode(args.text.read_text(encoding="utf-8")).ids
    lengths = sorted(args.tokens)
    ids = (text * (lengths[-1] // len(text) + 1))[: lengths[-1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packs = args.packs or folder
        opening = {"hashes": Timer(), "sizes": Timer()}
        for _ in range(5):
            for kind, timer in opening.items():
                timer(Model, args.bundle, verify=kind == "hashes", num_threads=args.threads).close()
        with Model(args.bundle, num_threads=args.threads) as model:
            make_packs(model, ids, lengths, packs)
            results = {
                "state_bytes": model.state_bytes,
                "model_open": {kind: timer.summary() for kind, timer in opening.items()},
                "packs": [measure_pack(model, packs / f"{length}.lococo", length) for length in lengths],
                "pool": measure_pool(model, packs / f"{lengths[-1]}.lococo", folder),
                "memory": measure_memory(model, packs / f"{lengths[-1]}.lococo"),
            }
    report = {
        "model": args.bundle.name,
        "bundle_id": model.manifest.bundle_id,
        "mem_size": model.manifest.cache.mem_size,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "onnxruntime": installed_version("onnxruntime"),
        "build_commit": build_commit(),
        **results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
