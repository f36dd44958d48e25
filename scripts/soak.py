#!/usr/bin/env python3
"""One session for a million tokens, half read and half generated: are its numbers finite, its memory and time flat?

Every window ends with a trip to disk: the state is saved, loaded and compared. Writes JSON and prints a line for every
tenth; the exit code is 1 if anything is not as it should be. Usage: soak.py BUNDLE OUT.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lococo_bench.device import cpu_name
from lococo_bench.measure import build_commit, installed_version
from lococo_runtime import Model, SamplingParams, Session
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import Manifest

STATE_HEADER_BYTES = 88  # docs/bundle.md
FLOATS = {"float32": np.float32, "float16": np.float16}
ALLOWED_GROWTH_BYTES = 1 << 20


def state_is_finite(manifest: Manifest, state: bytes) -> bool:
    """Whether every float of a state file is."""
    offset = STATE_HEADER_BYTES
    for tensor in manifest.state:
        if tensor.dtype in FLOATS:
            values = np.frombuffer(state, FLOATS[tensor.dtype], int(np.prod(tensor.shape)), offset)
            if not np.isfinite(values).all():
                return False
        elif tensor.dtype == "bfloat16":  # infinite or NaN where all bits of the exponent are set
            bits = np.frombuffer(state, np.uint16, int(np.prod(tensor.shape)), offset)
            if ((bits & 0x7F80) == 0x7F80).any():
                return False
        offset += tensor.nbytes
    return True


def run_window(session: Session, rng: np.random.Generator, tokens: int, path: Path) -> dict[str, Any]:
    """Reads and generates `tokens` tokens, saves and loads the state, and says how that went."""
    ids = rng.integers(0, session.model.vocab_size, tokens // 2)
    block = session.model.manifest.cache.block_size
    finite = True
    start_ns, start_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    for first in range(0, len(ids), block):
        finite &= bool(np.isfinite(session.prefill(ids[first : first + block], return_all=True)).all())
    read_ns, read_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    count = tokens - len(ids)
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=count, ignore_eos=True)
    session.step(session.generate_all([], params)[-1])  # a NaN among the logits would have ended it
    end_ns, end_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
    state = session.state()
    session.save(path)
    session.reset()
    session.load(path)
    return {
        "position": session.position,
        "finite": finite
        and bool(np.isfinite(session.logits()).all())
        and state_is_finite(session.model.manifest, state),
        "state_bytes": path.stat().st_size,
        "resumed": session.state() == state,
        "private_bytes": memory_bytes("RssAnon"),
        "read_ns_per_token": (read_ns - start_ns) / len(ids),
        "generate_ns_per_token": (end_ns - read_ns) / count,
        "read_cpu_ns_per_token": (read_cpu_ns - start_cpu_ns) / len(ids),
        "generate_cpu_ns_per_token": (end_cpu_ns - read_cpu_ns) / count,
    }


def summarise(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """First against last quarter; the first window is warm-up."""
    warm = windows[1:]
    quarter = max(1, len(warm) // 4)

    def ratio(key: str) -> float:
        first, last = ([w[key] for w in part] for part in (warm[:quarter], warm[-quarter:]))
        return statistics.median(last) / statistics.median(first)

    keys = ("read_ns_per_token", "generate_ns_per_token", "read_cpu_ns_per_token", "generate_cpu_ns_per_token")
    return {
        "tokens": windows[-1]["position"],
        "finite": all(w["finite"] for w in windows),
        "resumed": all(w["resumed"] for w in windows),
        "state_bytes": sorted({w["state_bytes"] for w in windows}),
        "grown_bytes": max(w["private_bytes"] for w in warm) - warm[0]["private_bytes"],
        **{f"median_{key}": statistics.median(w[key] for w in warm) for key in keys},
        **{f"last_to_first_{key}": ratio(key) for key in keys},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="default 1,000,000")
    parser.add_argument("--windows", type=int, default=100, help="pieces that are measured each (default 100)")
    parser.add_argument("--threads", type=int, default=1, help="default 1, which other processes disturb least")
    parser.add_argument(
        "--time-ratio",
        type=float,
        default=1.1,
        help="fail if the last quarter takes this many times the first's CPU time",
    )
    args = parser.parse_args()
    if args.windows < 2 or args.tokens < 2 * args.windows:
        parser.error("expected at least 2 windows of at least 2 tokens")

    rng = np.random.default_rng(0)
    windows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Model(args.bundle, num_threads=args.threads) as model,
        model.session() as session,
    ):
        for i in range(args.windows):
            windows.append(run_window(session, rng, args.tokens // args.windows, Path(folder) / "state"))
            if (i + 1) % max(1, args.windows // 10) == 0:
                w = windows[-1]
                print(
                    f"{w['position']:>12,} tokens  {w['generate_ns_per_token'] / 1e3:8.1f} us a generated token"
                    f"  {w['private_bytes'] / 2**20:8.2f} MiB private  {'finite' if w['finite'] else 'NOT FINITE'}",
                    flush=True,
                )
        summary = summarise(windows)
        report = {
            "bundle_id": model.manifest.bundle_id,
            "cpu": cpu_name(),
            "threads": args.threads,
            "onnxruntime": installed_version("onnxruntime"),
            "build_commit": build_commit(),
            **summary,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"    {json.dumps(w)}" for w in windows)
    text = json.dumps({**report, "windows": []}, indent=2).replace('"windows": []', f'"windows": [\n{lines}\n  ]')
    args.out.write_text(text + "\n", encoding="utf-8")
    wrong = [name for name in ("finite", "resumed") if not summary[name]]
    if summary["grown_bytes"] > ALLOWED_GROWTH_BYTES:
        wrong.append(f"grown_bytes {summary['grown_bytes']:,}")
    for key in ("last_to_first_read_cpu_ns_per_token", "last_to_first_generate_cpu_ns_per_token"):
        if summary[key] > args.time_ratio:
            wrong.append(f"{key} {summary[key]:.3f}")
    print(json.dumps({**summary, "wrong": wrong}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
