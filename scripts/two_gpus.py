"""Fit on several GPUs of a host beside one: the same losses, and tokens a second of both, as JSON.

    python scripts/two_gpus.py --model DIR --text PATH... -o FILE

One process reads batches of `--batch`, several share them. Every loss runs alone on the devices; the first steps, which
warm up, are compared but not timed. Losses differ by the order in which gradients are added, and in half precision by
what that does to choices among nearly equal scores. `--set NAME=VALUE` changes a setting of lococo-fit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lococo_bench.device import open_device
from lococo_bench.measure import build_commit

WARM = 2
LOSSES: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "distillation": {"reconstruction_weight": 0.0, "distill_weight": 1.0},
    "tuning": {  # next token, LoRA and norms
        "reconstruction_weight": 0.0, "lm_weight": 1.0, "tune": ("norms",), "lora": 16, "tune_lr": 1e-3,
    },
}  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """One process: fits, and the first one writes what it saw."""
    import torch
    from lococo_calibration.fit import Fit
    from lococo_calibration.settings import FitSettings

    found: dict[str, Any] = {}
    for name in args.losses:
        loss = LOSSES[name]
        given = {
            "model": args.model, "text": tuple(args.text), "output": str(args.output.absolute()) + ".none",
            "cache_dir": args.cache_dir, "device": args.device, "held_out": 0.0, "eval_every": 0, "steps": args.steps,
            "batch": args.batch // int(os.environ.get("WORLD_SIZE", "1")), "mem_size": 128, "warmup": 4,
        }  # fmt: skip
        run = Fit(FitSettings(**given | loss | dict(map(setting, args.set))), show=lambda line: None)
        entries, seconds = [], []
        for _ in range(args.steps):
            since = time.perf_counter()
            entries.append(run.train_step())  # ends with a wait for the device
            seconds.append(time.perf_counter() - since)
        timed = list(zip(entries, seconds, strict=True))[WARM:]
        speed = {}
        for regime in sorted({e["regime"] for e, _ in timed}):
            chosen = [(e["tokens"], t) for e, t in timed if e["regime"] == regime]
            speed[regime] = sum(n for n, _ in chosen) / sum(t for _, t in chosen)
        found[name] = {
            "losses": [e["loss"] for e in entries], "regimes": [e["regime"] for e in entries],
            "tokens_per_second": speed,
        }  # fmt: skip
        device, dtype, first = run.model.device, str(run.model.dtype), run.workers.first
        if device.type == "cuda":
            found[name]["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
        del run
    if first:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        document = {"device": name, "dtype": dtype, "torch": torch.__version__, "losses": found}
        Path(args.worker).write_text(json.dumps(document), encoding="utf-8")


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--text", nargs="+", required=True)
    add("-o", "--output", type=Path, required=True)
    add("--processes", type=int, default=2)
    add("--batch", type=int, default=8, help="of all processes together")
    add("--steps", type=int, default=12)
    add("--device", default="auto")
    add("--cache-dir", help="where tokenised text is kept (a folder that goes away)")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    add("--set", action="append", default=[], metavar="NAME=VALUE")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.batch % args.processes or args.steps <= WARM:
        parser.error(f"expected a batch that {args.processes} processes can share, and more than {WARM} steps")
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for count in (1, args.processes):
            target = Path(folder) / f"{count}.json"
            command = [sys.executable]
            if count > 1:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command += [*sys.argv, "--worker", str(target), "--cache-dir", args.cache_dir or folder]
            subprocess.run(command, check=True)
            results.append(json.loads(target.read_text(encoding="utf-8")))
    one, several = (r.pop("losses") for r in results)
    described = open_device("cpu" if results[0]["device"] == "cpu" else "cuda:0").describe()
    about = {"commit": build_commit(), **{k: described.get(k) for k in ("driver_version", "cpu_info")}}
    document = {**results[0], **about, "processes": args.processes, "batch": args.batch, "set": args.set, "losses": {}}
    for name in args.losses:
        differences = [abs(b / a - 1) for a, b in zip(one[name]["losses"], several[name]["losses"], strict=True)]
        factor = {k: several[name]["tokens_per_second"][k] / v for k, v in one[name]["tokens_per_second"].items()}
        document["losses"][name] = {
            "one": one[name], "several": several[name], "largest_difference": max(differences), "speedup": factor,
        }  # fmt: skip
        times = ", ".join(f"{v:.2f} times as fast in {k} steps" for k, v in factor.items())
        print(f"{name}: losses differ by {max(differences):.1e} at most; {times}")
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
