"""The runtime on the CPU against ONNX Runtime's own Run and against transformers; writes JSON.

Every comparison interleaves its two sides in short bursts, so that a machine that drifts moves both; ratios are of
medians. Usage: benchmark_cpu.py MODEL_DIR TEXT_FILE OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from benchmark_batch import summary, timed_ms
from lococo_bench.device import cpu_name
from lococo_bench.measure import build_commit
from lococo_runtime import Model, Session
from lococo_runtime._process import memory_bytes
from lococo_runtime.llm import load_tokenizer

from lococo_export import export_bundle, load_checkpoint

MEM_SIZE = BLOCK = 256
BURST = 17  # one window of decoding: a fusion and 16 plain steps


def interleave(sides: dict[str, Callable[[], object]], bursts: int) -> dict[str, list[float]]:
    """Times each side BURST calls at a time, in turn; the first burst of each is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for burst in range(bursts + 1):
        for name, call in sides.items():
            time.sleep(0.05)  # the other side's worker threads stop spinning
            values = [timed_ms(call) for _ in range(BURST)]
            if burst:
                times[name] += values
    return times


class Steps:
    """Steps of a session over fixed tokens; plain steps and steps with a fusion kept apart."""

    def __init__(self, session: Session, ids: list[int]) -> None:
        self.session, self.ids, self.next = session, ids, 0
        self.fusion_ms: list[float] = []
        self.plain_ms: list[float] = []

    def __call__(self) -> None:
        token = self.ids[self.next % len(self.ids)]
        self.next += 1
        before = self.session.live_slots
        took = timed_ms(lambda: self.session.step(token))
        (self.fusion_ms if self.session.live_slots < before else self.plain_ms).append(took)


def onnxruntime_run(bundle: Path) -> Callable[[], object]:
    """ONNX Runtime's own Run of decoder_1.onnx, bound to fixed buffers, with the options that the runtime uses."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(bundle / "decoder_1.onnx", options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
    for spec in session.get_inputs():
        array = np.full(spec.shape, MEM_SIZE, kinds[spec.type])
        if spec.type == "tensor(float)":
            array = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
        binding.bind_ortvalue_input(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for spec in session.get_outputs():
        empty = np.zeros(spec.shape, kinds[spec.type])
        binding.bind_ortvalue_output(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(empty))
    return lambda: session.run_with_iobinding(binding)


def transformers_step(model: Any, ids: list[int]) -> Callable[[], object]:
    """Greedy decoding with the growing cache, after `ids`."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        for first in range(0, len(ids), 512):
            out = model(torch.tensor([ids[first : first + 512]]), past_key_values=cache, logits_to_keep=1)
    state = {"token": out.logits[0, -1].argmax().view(1, 1)}

    def step() -> None:
        with torch.inference_mode():
            out = model(state["token"], past_key_values=cache)
            state["token"] = out.logits[0, -1].argmax().view(1, 1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--far", type=int, default=100_000, help="the far position (default 100,000)")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        start = time.perf_counter()
        export_bundle(load_checkpoint(args.model, policy="h2o", mem_size=MEM_SIZE, block_size=BLOCK), bundle)
        export_s = time.perf_counter() - start
        text = load_tokenizer(bundle).encode(args.text.read_text(encoding="utf-8")).ids
        ids = (text * (args.far // len(text) + 1))[: args.far]
        results: dict[str, Any] = {"export_s": export_s}
        with Model(bundle) as model:
            results |= {"state_bytes": model.state_bytes, "session_bytes": model.session_bytes}
            with model.session() as near, model.session() as far:
                near.prefill(ids[:1000])
                results |= read_far(far, ids)
                near_steps, far_steps = Steps(near, ids), Steps(far, ids)
                runs = interleave({"near": near_steps, "far": far_steps}, 12)
                results["position_1000"], results[f"position_{args.far}"] = summary(runs["near"]), summary(runs["far"])
                results["ratio_far_to_near"] = statistics.median(runs["far"]) / statistics.median(runs["near"])
                results["plain_step"] = summary(near_steps.plain_ms + far_steps.plain_ms)
                results["fusion_step"] = summary(near_steps.fusion_ms + far_steps.fusion_ms)

                steps = Steps(near, ids)
                runs = interleave({"lococo": steps, "onnxruntime": onnxruntime_run(bundle)}, 12)
                results["onnxruntime_run"] = summary(runs["onnxruntime"])
                # a Run has no fusion in it: compare with plain steps
                results["ratio_plain_step_to_onnxruntime"] = statistics.median(
                    steps.plain_ms[BURST:]
                ) / statistics.median(runs["onnxruntime"])

                hf = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
                for context in (512, 8192):
                    near.reset()
                    near.prefill(ids[:context])
                    sides = {"lococo": Steps(near, ids), "transformers": transformers_step(hf, ids[:context])}
                    runs = interleave(sides, 4)
                    mean = {name: statistics.fmean(values) for name, values in runs.items()}
                    results[f"context_{context}"] = {name: summary(values) for name, values in runs.items()}
                    results[f"ratio_to_transformers_{context}"] = mean["lococo"] / mean["transformers"]

    report = {
        "machine": machine(),
        "model": args.model.name,
        "policy": "h2o",
        "mem_size": MEM_SIZE,
        "block_size": BLOCK,
        **results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if not isinstance(v, dict)}, indent=2))


def read_far(session: Session, ids: list[int]) -> dict[str, Any]:
    """Reads all of `ids`; tokens/s, and how much private memory grew from the halfway mark to the end."""
    half = len(ids) // 2
    start = time.perf_counter()
    session.prefill(ids[:half])
    at_half = memory_bytes("RssAnon")
    session.prefill(ids[half:])
    seconds = time.perf_counter() - start
    return {
        "prefill_tokens_per_s": len(ids) / seconds,
        "grown_tokens": len(ids) - half,
        "grown_bytes": memory_bytes("RssAnon") - at_half,
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": build_commit(),
    }


if __name__ == "__main__":
    main()
