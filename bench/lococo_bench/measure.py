"""The measurements: reading prompts, single steps, and greedy generation, at any depth of context.

Every call is timed on the host's clock with the device idle before and after. Token ids are random: the time of a
forward does not depend on them.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from lococo_runtime import InvalidArgumentError, Model, SamplingParams, Session
from lococo_runtime import _c_api as c
from lococo_runtime.bundle import DTYPE_BYTES, WEIGHTS_NAME, Manifest

from .device import Device, cpu_name, open_device

STATE_HEADER_BYTES = 88  # docs/bundle.md
AUTO_PREFILL_SECONDS = 30.0

Row = dict[str, Any]
"""One measurement under llama-bench's keys, and more; see docs/benchmark.md."""

DepthBy = Literal["auto", "prefill", "position"]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        n_prompt: lengths of prompts, tokens.
        n_gen: how many tokens to generate.
        n_depth: tokens in the context before each test.
        repetitions: timed runs of each test, after one that is not counted.
        depth_by: "prefill" reads the whole depth; "position" reads until the slots have been fused several times and
            writes the position into the state; "auto" reads if that takes at most 30 s.

    Raises:
        InvalidArgumentError: numbers out of range.
    """

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    n_depth: tuple[int, ...] = (0,)
    repetitions: int = 5
    depth_by: DepthBy = "auto"

    def __post_init__(self) -> None:
        for name, least in (("n_prompt", 1), ("n_gen", 1), ("n_depth", 0)):
            wrong = [x for x in getattr(self, name) if not least <= x < 2**31]
            if wrong:
                raise InvalidArgumentError(f"{name}: expected {least} to 2^31-1, got {wrong[0]}")
        if self.repetitions < 1:
            raise InvalidArgumentError(f"repetitions: expected at least 1, got {self.repetitions}")


def summary_ms(values: list[float]) -> dict[str, float]:
    """Milliseconds: min, p50, p95, p99, mean, and how many."""
    cuts = np.percentile(values, [50, 95, 99])
    return {
        "min": min(values),
        "p50": float(cuts[0]),
        "p95": float(cuts[1]),
        "p99": float(cuts[2]),
        "mean": statistics.fmean(values),
        "samples": len(values),
    }


class Clock:
    """Times calls with the device idle on both sides."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def ns(self, call: Callable[[], object]) -> int:
        """Nanoseconds of one call."""
        self.device.synchronize()
        start = time.perf_counter_ns()
        call()
        self.device.synchronize()
        return time.perf_counter_ns() - start


def timing(samples_ns: list[int], warmup_ns: int | None, tokens: int) -> Row:
    """llama-bench's keys for runs of `tokens` tokens each."""
    rates = [1e9 * tokens / ns for ns in samples_ns]
    spread = len(samples_ns) > 1
    return {
        "test_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(samples_ns)),
        "stddev_ns": round(statistics.stdev(samples_ns)) if spread else 0,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if spread else 0.0,
        "samples_ns": samples_ns,
        "samples_ts": rates,
        "warmup_ns": warmup_ns,
    }


def at_position(state: bytes, position: int) -> bytes:
    """The same state, further on: the position is its first number (docs/bundle.md)."""
    changed = bytearray(state)
    struct.pack_into("<q", changed, STATE_HEADER_BYTES, position)
    changed[56:88] = hashlib.sha256(changed[:56] + changed[STATE_HEADER_BYTES:]).digest()
    return bytes(changed)


def step_bytes(m: Manifest) -> int:
    """Bytes that a plain step has to read: every matrix but the embedding's other rows, and all slots.

    Norms, biases and RoPE tables are left out: less than a thousandth.
    """
    g = m.model
    attention = 2 * g.hidden_size * g.head_dim * (g.num_heads + g.num_kv_heads)
    weights = g.num_layers * (attention + 3 * g.hidden_size * g.intermediate_size) + g.vocab_size * g.hidden_size
    slots = sum(t.nbytes for t in m.state if t.name.startswith(("past_key_values.", "past_scores.")))
    return weights * DTYPE_BYTES[m.dtype] + slots


def parameters(m: Manifest) -> int:
    """Of the model, fusion heads included; RoPE tables count too, a little."""
    return next(f.nbytes for f in m.files if f.path == WEIGHTS_NAME) // DTYPE_BYTES[m.dtype]


def human(count: int) -> str:
    """Such as "135M" or "6.74B"."""
    unit, name = next((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")) if count >= u)
    return f"{count / unit:.3g}{name}"


def build_commit() -> str:
    """Of this source tree, $LOCOCO_BUILD_COMMIT where the tree is a copy, else "unknown"."""
    if given := os.environ.get("LOCOCO_BUILD_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed_version(package: str) -> str | None:
    """Of an installed distribution, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Bench:
    """A bundle on a device, measured. A context manager.

    Args:
        bundle: a bundle directory.
        device, backend, num_threads: as `lococo_runtime.Model`.
        progress: told what begins.

    Attributes:
        model, session: what is measured.
        manifest: of the bundle.
        common: what all rows have in common.

    Raises:
        as `lococo_runtime.Model` and `open_device`.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "cpu",
        backend: str = "onnxruntime",
        num_threads: int = 0,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._tokens = np.random.default_rng(0)
        self._full: bytes | None = None  # a state whose slots have been fused several times
        self._rate: float | None = None
        self.device = open_device(device, num_threads)
        self._clock, self.progress = Clock(self.device), progress
        self._copy_bandwidth = self.device.copy_bandwidth()
        used: list[int] = [self.device.memory().get("device_used_bytes", 0)]
        start = time.perf_counter()
        with c.library_log() as log:
            self.model = Model(bundle, device=device, backend=backend, num_threads=num_threads)
        load_ms = 1e3 * (time.perf_counter() - start)
        used.append(self.device.memory().get("device_used_bytes", 0))
        sessions: list[Session] = []
        create_ns = self._clock.ns(lambda: sessions.append(self.model.session()))
        self.session = sessions[0]
        used.append(self.device.memory().get("device_used_bytes", 0))
        m = self.manifest = self.model.manifest
        self._window = m.cache.buffer + 1
        self.common: Row = {
            "implementation": "lococo",
            "build_commit": build_commit(),
            "version": installed_version("lococo-export"),
            "cpu_info": cpu_name(),
            **self.device.describe(),
            "backend": backend,
            "device": device,
            "n_threads": num_threads,
            **_engines(log),
            "graph_nodes": None if device == "cpu" else self._warm_up(),
            "model_filename": Path(bundle).name,
            "model_type": f"{m.model.family} {human(parameters(m))} {m.dtype}",
            "model_size": next(f.nbytes for f in m.files if f.path == WEIGHTS_NAME),
            "model_n_params": parameters(m),
            "bundle_id": m.bundle_id,
            "policy": m.cache.policy,
            "mem_size": m.cache.mem_size,
            "n_batch": m.cache.block_size,
            "window_tokens": self._window,
            "state_bytes": self.model.state_bytes,
            "session_bytes": self.model.session_bytes,  # promised, host memory included; the next two were measured
            "model_device_bytes": used[1] - used[0] if any(used) else None,
            "session_device_bytes": used[2] - used[1] if any(used) else None,
            "copy_bytes_per_second": self._copy_bandwidth,
            "step_bytes": step_bytes(m),
            "load_ms": load_ms,
            "create_session_ms": create_ns / 1e6,
        }

    def close(self) -> None:
        """Closes session and model."""
        self.session.close()
        self.model.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, plan: Plan) -> Iterator[Row]:
        """Measures, row by row: prompts at every depth, then generation at every depth."""
        for depth in plan.n_depth:
            state, depth_by = self._reach(depth, plan.depth_by)
            for n_prompt in plan.n_prompt:
                self.progress(f"{n_prompt} tokens of prompt at depth {depth}")
                yield {**self.common, **self._prompt(n_prompt, state, plan), "n_depth": depth, "depth_by": depth_by}
            for n_gen in plan.n_gen:
                self.progress(f"{n_gen} tokens generated at depth {depth}")
                yield {**self.common, **self._generate(n_gen, state, plan), "n_depth": depth, "depth_by": depth_by}

    # --- tests -------------------------------------------------------------------------------------------------------

    def _prompt(self, n: int, state: bytes | None, plan: Plan) -> Row:
        ids = self._random(n)
        samples, first_token = [], []
        for _ in range(plan.repetitions + 1):
            self._restore(state)
            samples.append(self._clock.ns(lambda: self._prefill(ids)))
            first_token.append((samples[-1] + self._clock.ns(self.session.sample)) / 1e6)
        return {
            "n_prompt": n,
            "n_gen": 0,
            **timing(samples[1:], samples[0], n),
            "ttft_ms": summary_ms(first_token[1:]),
            **self.device.memory(),
        }

    def _generate(self, n: int, state: bytes | None, plan: Plan) -> Row:
        """Greedy generation, n forwards in one call; single steps; whole windows."""
        samples = []
        energy = None
        for repetition in range(plan.repetitions + 1):
            self._restore(state)
            if state is None:
                self._step(0)  # there is nothing to choose a token from before the first one
            if repetition == 1:
                energy = self.device.energy_joules()
            # the first token is there already, so n + 1 tokens take n forwards
            samples.append(self._clock.ns(lambda: self._greedy(n + 1)))
        energy_after = self.device.energy_joules()
        joules = None if energy is None or energy_after is None else energy_after - energy
        self.progress(f"single steps after {n} tokens")
        plain, fusion = self._single_steps(n * plan.repetitions, state)
        floor_ms = 1e3 * self.common["step_bytes"] / self._copy_bandwidth
        rows: Row = {
            "n_prompt": 0,
            "n_gen": n,
            **timing(samples[1:], samples[0], n),
            "plain_step_ms": summary_ms(plain) if plain else None,
            "fusion_step_ms": summary_ms(fusion) if fusion else None,
            **self._windows(n, state, plan.repetitions),
            "joules_per_token": None if joules is None or sum(samples[1:]) < 5e8 else joules / (n * plan.repetitions),
            "floor_ms": floor_ms,
            **self.device.memory(),
        }
        if plain:
            middle = rows["plain_step_ms"]["p50"]
            rows |= {"bytes_per_second": 1e3 * self.common["step_bytes"] / middle, "floor_share": floor_ms / middle}
        return rows

    def _single_steps(self, count: int, state: bytes | None) -> tuple[list[float], list[float]]:
        """Milliseconds of single steps over random tokens: those without a fusion, those with one."""
        self._restore(state)
        for token in self._random(2 * self._window):  # warm-up
            self._step(int(token))
        plain: list[float] = []
        fusion: list[float] = []
        for token in self._random(count):
            live = self.session.live_slots
            took = self._clock.ns(lambda token=int(token): self._step(token)) / 1e6  # type: ignore[misc]
            (plain if self.session.live_slots > live else fusion).append(took)
        return plain, fusion

    def _windows(self, n: int, state: bytes | None, repetitions: int) -> Row:
        """Greedy milliseconds a token over whole windows, from the first fusion at or after the depth; microseconds
        that the device waits for the host before a window.
        """
        windows = -(-n // self._window)
        self._restore(state)
        while self.session.live_slots != self.manifest.cache.mem_size:
            self._step(0)
        fused = self.session.state()
        values, waits = [], []
        for _ in range(repetitions + 1):
            self.session.set_state(fused)  # it counts from 0 again
            took = self._clock.ns(lambda: self._greedy(windows * self._window + 1))
            values.append(took / 1e6 / (windows * self._window))
            ran, idle_seconds = self.session.windows
            if ran > 1:  # 0 on a CPU
                waits.append(1e6 * idle_seconds / (ran - 1))
        return {
            "window_ms_per_token": summary_ms(values[1:]),
            "window_host_us": statistics.median(waits[1:]) if waits else None,
        }

    # --- depth -------------------------------------------------------------------------------------------------------

    def _reach(self, depth: int, by: DepthBy) -> tuple[bytes | None, str]:
        """A state at `depth`, None for the empty one, and how it was reached."""
        if depth == 0:
            return None, "prefill"
        full = self._filling
        if depth <= full:
            self.session.reset()
            self._prefill(self._random(depth))
            return self.session.state(), "prefill"
        if self._full is None:
            self.progress("filling the slots")
            self.session.reset()
            ids = self._random(full)
            self._prefill(ids)
            self.session.reset()
            self._rate = 1e9 * full / self._clock.ns(lambda: self._prefill(ids))
            self._full = self.session.state()
        if by == "position" or (by == "auto" and depth / (self._rate or 1) > AUTO_PREFILL_SECONDS):
            return at_position(self._full, depth), "position"
        self.session.set_state(self._full)
        self.progress(f"reading {depth} tokens")
        self._prefill(self._random(depth - full))
        return self.session.state(), "prefill"

    @property
    def _filling(self) -> int:
        """Tokens after which the slots have been fused several times: whole blocks."""
        cache = self.manifest.cache
        return cache.block_size * -(-4 * cache.capacity // cache.block_size)

    def _warm_up(self) -> dict[str, int] | None:
        """Runs everything that is repeated; None, or the nodes of the graphs that were captured, by name."""
        with c.library_log() as log:
            self._prefill(self._random(self._filling))
            for token in self._random(2 * self._window):
                self._step(int(token))
            self._greedy(4 * self._window)
        self.session.reset()
        found = (re.match(r"captured (.+): (\d+) nodes", line) for line in log)
        return {m.group(1): int(m.group(2)) for m in found if m} or None

    def _restore(self, state: bytes | None) -> None:
        if state is None:
            self.session.reset()
        else:
            self.session.set_state(state)

    # --- the calls that are timed: the C library's, logits stay where they are ---------------------------------------

    def _random(self, n: int) -> npt.NDArray[np.int32]:
        return self._tokens.integers(0, self.model.vocab_size, n).astype(np.int32)

    def _prefill(self, ids: npt.NDArray[np.int32]) -> None:
        c.call("lococo_session_prefill", self.session._handle, ids.ctypes.data_as(c._IDS), ids.size, None)

    def _step(self, token: int) -> None:
        c.call("lococo_session_step", self.session._handle, ctypes.c_int32(token))

    def _greedy(self, n: int) -> None:
        params = self.session._native(SamplingParams(ignore_eos=True))
        c.call("lococo_session_generate", self.session._handle, ctypes.byref(params), n, c.TokenFn(), None, None)


def _engines(log: list[str]) -> Row:
    """The TensorRT and the engines, or the ONNX Runtime, that the library says it took; lococo-build's promise."""
    tensorrt = [m for line in log if (m := re.match(r"TensorRT ([\d.]+),.* engines (.*)", line))]
    onnxruntime = [m for line in log if (m := re.match(r"ONNX Runtime ([\d.]+) on ", line))]
    directory = Path(tensorrt[0].group(2)) if tensorrt else None
    return {
        "tensorrt_version": tensorrt[0].group(1) if tensorrt else None,
        "engines": directory.name if directory else None,
        "promised_device_bytes": json.loads((directory / "engines.json").read_text("utf-8"))["device_bytes"]
        if directory
        else None,
        "onnxruntime_version": onnxruntime[0].group(1) if onnxruntime else None,
    }
