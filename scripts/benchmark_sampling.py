"""What choosing a token costs beside the step that reads it, on the CPU; writes JSON.

Sampling runs in the calling thread and is timed by that thread's clock, which other processes do not advance; a step
runs in several threads and is timed by the wall clock, so it wants a quiet machine.

Usage: benchmark_sampling.py BUNDLE TEXT_FILE OUT.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmark_cpu import machine, summary
from lococo_runtime import Model, SamplingParams
from lococo_runtime.llm import load_tokenizer

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}
CASES: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=0.8, top_k=50),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_p, hot": SamplingParams(temperature=5.0, top_p=0.95),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "typical_p": SamplingParams(temperature=0.8, typical_p=0.95),
    "penalties": SamplingParams(temperature=0.8, **PENALTIES),
    "everything": SamplingParams(
        temperature=0.8,
        top_k=1000,
        top_p=0.95,
        min_p=0.01,
        typical_p=0.95,
        logit_bias={i: 0.5 for i in range(300)},
        logprobs=20,
        **PENALTIES,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=60, help="tokens read (default 60); each is sampled in every way")
    args = parser.parse_args()

    def timed_ms(call: Callable[[], object], clock: Callable[[], int]) -> float:
        start = clock()
        call()
        return (clock() - start) / 1e6

    steps: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in CASES}
    with Model(args.bundle) as model, model.session() as session:
        ids = load_tokenizer(args.bundle).encode(args.text.read_text(encoding="utf-8")).ids[: 1000 + args.rounds]
        mask = np.full((model.vocab_size + 31) // 32, 0xFFFFFFFF, np.uint32)
        session.prefill(ids[:1000])
        for token in ids[1000:]:
            steps.append(timed_ms(lambda token=token: session.step(token), time.perf_counter_ns))  # type: ignore[misc]
            for name, params in CASES.items():

                def sample(params: SamplingParams = params) -> None:
                    chosen = session.sample(params, mask if params.logprobs else None)
                    if params.logprobs:
                        session.logprobs(chosen, params.logprobs)

                samples[name].append(timed_ms(sample, time.thread_time_ns))
        vocab_size = model.vocab_size
    report = {
        "machine": machine(),
        "vocab_size": vocab_size,
        "step": summary(steps),
        "sample": {name: summary(values) for name, values in samples.items()},
        "ratio_of_medians": {name: statistics.median(v) / statistics.median(steps) for name, v in samples.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("step", "sample", "ratio_of_medians")}, indent=2))


if __name__ == "__main__":
    main()
