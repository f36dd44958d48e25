"""A bundle's TensorRT engines, timed: plain steps, fusion steps, windows, prefill, device memory; writes JSON.

Usage: benchmark_gpu.py BUNDLE OUT.json [--repeat N] [--depth 1024,1048576]
Every call is timed on the host's clock from call to finished result. Token ids are random: the time of a forward does
not depend on them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import platform
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lococo_runtime import Model, SamplingParams, Session
from lococo_runtime import _c_api as c

HEADER = 88  # bytes of a state's header
LOG: list[str] = []


@c.LogFn
def keep_log(level: int, message: bytes, user: object) -> None:
    text = message.decode(errors="replace")
    if level > 0 or not text.startswith("tensorrt:"):
        print(text, flush=True)
        LOG.append(text)


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def summary(values: list[float]) -> dict[str, float]:
    cuts = np.percentile(values, [50, 95, 99])
    return {
        "min": min(values),
        "p50": float(cuts[0]),
        "p95": float(cuts[1]),
        "p99": float(cuts[2]),
        "mean": float(np.mean(values)),
        "samples": len(values),
    }


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 1 GiB, the best of 20."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del a, b
    torch.cuda.empty_cache()
    return 2 * (1 << 30) / min(times)


def at_position(state: bytes, position: int) -> bytes:
    """The same state, further on."""
    changed = bytearray(state)
    changed[HEADER : HEADER + 8] = struct.pack("<q", position)
    changed[56:88] = hashlib.sha256(changed[:56] + changed[HEADER:]).digest()
    return bytes(changed)


def measure_steps(session: Session, steps: int) -> dict[str, dict[str, float]]:
    """lococo_session_step, milliseconds; logits stay on the device."""
    times: dict[str, list[float]] = {"plain": [], "fusion": []}
    live = session.live_slots
    for token in np.random.default_rng(0).integers(0, session.model.vocab_size, steps).tolist():
        elapsed = timed_ms(lambda token=token: c.call("lococo_session_step", session._handle, token))
        times["plain" if session.live_slots > live else "fusion"].append(elapsed)
        live = session.live_slots
    return {kind: summary(values) for kind, values in times.items()}


def measure_windows(session: Session, window: int, windows: int) -> float:
    """lococo_session_generate, greedy, without a callback: milliseconds a token."""
    params, tokens = SamplingParams().to_c(), windows * window + 1
    count = ctypes.c_int32()
    total = timed_ms(
        lambda: c.call(
            "lococo_session_generate", session._handle, ctypes.byref(params), tokens, c.TokenFn(), None,
            ctypes.byref(count),
        )
    )  # fmt: skip
    if count.value != tokens:
        raise SystemExit(f"end of sequence after {count.value} tokens: measure a bundle without one")
    return total / tokens


def measure_prefill(session: Session, tokens: int, repeat: int) -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(0, session.model.vocab_size, tokens).astype(np.int32)
    pointer = ids.ctypes.data_as(c._IDS)
    times = []
    for _ in range(repeat + 1):  # the first is warm-up: graphs are captured
        session.reset()
        times.append(timed_ms(lambda: c.call("lococo_session_prefill", session._handle, pointer, tokens, None)))
    values = summary(times[1:])
    return {"tokens": tokens, "ms": values, "tokens_per_second": tokens / values["p50"] * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--depth", default="1024,1048576")
    args = parser.parse_args()

    c.library().lococo_set_log_callback(keep_log, None)
    torch.cuda.init()
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "bundle": args.bundle.name,
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "host": platform.node(),
        "copy_bytes_per_second": copy_bandwidth(),
    }
    gc.collect()
    memory = {"before": used_bytes()}
    start = time.perf_counter()
    model = Model(args.bundle, device="cuda:0", backend="tensorrt")
    load_ms = 1e3 * (time.perf_counter() - start)
    memory["model"] = used_bytes()
    sessions: list[Session] = []
    create_ms = [timed_ms(lambda: sessions.append(model.session())) for _ in range(2)]
    memory["two_sessions"] = used_bytes()
    sessions.pop().close()
    session = sessions[0]
    memory["one_session"] = used_bytes()
    cache = model.manifest.cache
    window = cache.capacity - cache.mem_size + 1
    result |= {
        "load_ms": load_ms,
        "create_session_ms": create_ms,
        "window_tokens": window,
        "session_bytes": model.session_bytes,
        "state_bytes": model.state_bytes,
        "weights_bytes": next(f.nbytes for f in model.manifest.files if f.path == "model.onnx.data"),
    }
    result["prefill"] = [measure_prefill(session, n, args.repeat) for n in (cache.block_size, 64 * cache.block_size)]
    memory["after_prefill"] = used_bytes()

    session.reset()
    session.prefill(np.random.default_rng(2).integers(0, model.vocab_size, 4 * cache.block_size))
    fused = session.state()
    result["depths"] = {}
    for depth in [int(d) for d in args.depth.split(",")]:
        # Positions count on from the depth; windows need a session that has just fused.
        session.set_state(at_position(fused, depth))
        if session.live_slots != cache.mem_size:
            raise SystemExit(f"live slots: expected {cache.mem_size} after whole blocks, got {session.live_slots}")
        measure_steps(session, 2 * window)  # warm: graphs are captured
        session.set_state(at_position(fused, depth))
        steps = measure_steps(session, 20 * window)
        session.set_state(at_position(fused, depth))
        measure_windows(session, window, 2)
        runs = []
        for _ in range(4 * args.repeat):
            session.set_state(at_position(fused, depth))
            runs.append(measure_windows(session, window, 10))
        windows, used = summary(runs), used_bytes()
        result["depths"][str(depth)] = {"steps_ms": steps, "window_ms_per_token": windows, "device_bytes_used": used}
        print(
            f"depth {depth}: plain {steps['plain']['p50']:.3f} ms, fusion {steps['fusion']['p50']:.3f} ms, window"
            f" {windows['p50']:.4f} ms/token (min {windows['min']:.4f}), device {used:,} bytes",
            flush=True,
        )
    # The same tokens by windows and by steps, in this dtype too.
    session.set_state(fused)
    params = SamplingParams(max_tokens=10 * window + 1, ignore_eos=True)
    in_windows = session.generate_all([], params)
    state = session.state()
    session.set_state(fused)
    result["windows_equal_steps"] = in_windows == list(session.generate([], params)) and state == session.state()
    result["memory"] = memory
    result["log"] = LOG
    for p in result["prefill"]:
        print(f"prefill {p['tokens']}: {p['tokens_per_second']:,.0f} tokens/s")
    print(f"windows equal steps: {result['windows_equal_steps']}; load {load_ms:.0f} ms, session {create_ms} ms")
    print(f"memory {memory}; session {model.session_bytes:,}; copy {result['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    session.close()
    model.close()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as e:
        return f"unknown: {e}"


if __name__ == "__main__":
    main()
