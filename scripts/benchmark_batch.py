"""Greedy decoding with N sessions in a batch against one session; writes JSON.

Both sides decode in bursts of one window, a fusion and as many plain steps as lie between two; bursts alternate, so
that a machine that drifts moves both. Throughputs and ratios are of median bursts; the first of each is warm-up.
Usage: benchmark_batch.py MODEL_DIR TEXT_FILE OUT.json, on the CPU, for several N
       benchmark_batch.py BUNDLE OUT.json --device cuda:0, for the N of a bundle with engines; reads random tokens
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lococo_bench.device import open_device
from lococo_bench.measure import build_commit, summary_ms
from lococo_runtime import Batch, Model, Session
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import read_manifest
from lococo_runtime.llm import load_tokenizer

from lococo_export import export_bundle, load_checkpoint


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def summary(values: list[float]) -> dict[str, float]:
    return {name if name == "samples" else f"{name}_ms": value for name, value in summary_ms(values).items()}


def decode_alone(session: Session, steps: int) -> None:
    for _ in range(steps):
        session.step(session.sample())


def decode_together(batch: Batch, steps: int) -> None:
    for _ in range(steps):
        batch.step(batch.sessions, [session.sample() for session in batch.sessions])


def measure(bundle: Path, ids: list[int], bursts: int, **options: str) -> dict[str, Any]:
    """One session and a full batch in turn; sessions stand a few tokens apart, so that they fuse at different steps."""
    with Model(bundle, **options) as model, model.session() as alone:
        alone.prefill(ids[:1000])
        decode_alone(alone, 2)
        before = memory_bytes("RssAnon")
        with Batch(model) as batch:
            for i in range(batch.size):
                session = model.session()
                session.prefill(ids[50 * i : 50 * i + 1000 + 5 * i])
                batch.add(session)
            decode_together(batch, 2)
            window = model.manifest.cache.buffer + 1
            one_ms, many_ms = [], []
            for _ in range(bursts + 1):
                time.sleep(0.05)  # the other side's worker threads stop spinning
                one_ms.append(timed_ms(lambda: decode_alone(alone, window)))
                time.sleep(0.05)
                many_ms.append(timed_ms(lambda: decode_together(batch, window)))
            result = {
                "sessions": batch.size,
                "implementation": batch.implementation,
                "one": {"tokens_per_s": window / statistics.median(one_ms[1:]) * 1e3, "burst": summary(one_ms[1:])},
                "batch": {
                    "tokens_per_s": window * batch.size / statistics.median(many_ms[1:]) * 1e3,
                    "burst": summary(many_ms[1:]),
                },
                "batch_bytes": model.batch_bytes,
                "session_bytes": model.session_bytes,
                "grown_anonymous_bytes": memory_bytes("RssAnon") - before,
            }
            result["ratio"] = result["batch"]["tokens_per_s"] / result["one"]["tokens_per_s"]
            for session in batch.sessions:
                session.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 2, 4, 16], metavar="N", help="(default 8 2 4 16)")
    parser.add_argument("--device", metavar="D", help="cuda:0 and on: MODEL_DIR is a bundle with engines")
    parser.add_argument("--bursts", type=int, default=12, help="of each side (default 12)")
    parser.add_argument("--note", help="a remark on the machine, kept in the file")
    args = parser.parse_args()
    if args.device:
        with args.out.open("w") as out:
            ids = np.random.default_rng(0).integers(3, read_manifest(args.model).model.vocab_size, 3000).tolist()
            result = measure(args.model, ids, args.bursts, device=args.device, backend="tensorrt")
            json.dump({"commit": build_commit(), **open_device(args.device).describe(), **result}, out, indent=2)
        print(f"{result['sessions']} sessions, {result['implementation']}: {result['ratio']:.2f} times one")
        return
    if args.text is None:
        parser.error("on the CPU it needs TEXT_FILE")

    from benchmark_cpu import BLOCK, MEM_SIZE, machine  # needs ONNX Runtime's Python package

    checkpoint = load_checkpoint(args.model, policy="h2o", mem_size=MEM_SIZE, block_size=BLOCK)
    results = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            export_bundle(checkpoint, bundle, batch=size)
            ids = load_tokenizer(bundle).encode(args.text.read_text(encoding="utf-8")).ids
            results.append(measure(bundle, ids, args.bursts))
        print(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in results[-1].items() if k != "note"}, flush=True
        )
    report = {
        "machine": machine(),
        **({"note": args.note} if args.note else {}),
        "model": args.model.name,
        "policy": "h2o",
        "mem_size": MEM_SIZE,
        "block_size": BLOCK,
        "batches": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
