"""Draws the figures of docs/lococo.md that show measurements: quality.svg and cpu.svg.

Usage: plot_measured.py [FOLDER], docs/images if none is given
From docs/quality/final (the heads in this repository; baselines in blocks of docs/quality/reported, same windows)
and docs/benchmarks/cpu.json, as they were measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
M = 128
LINES = {"full": ("full cache", "0.6"), "h2o": ("H2O", "C1"), "streaming": ("StreamingLLM", "C2"),
         "lococo": ("LoCoCo", "C0")}  # fmt: skip


def read(path: str) -> Any:
    return json.loads((DOCS / path).read_text(encoding="utf-8"))


def quality(out: Path) -> None:
    """Perplexity over context: a row a kind of text, a column a way of reading."""
    in_blocks = [r for r in read("quality/reported/baselines.json")["perplexity"] if r["regime"] == "block"]
    rows = in_blocks + [r for job in ("baselines", f"m{M}") for r in read(f"quality/final/{job}.json")["perplexity"]]
    figure, axes = plt.subplots(2, 2, figsize=(7, 4.6), layout="constrained", sharex=True, sharey="row")
    for i, kind in enumerate(("prose", "code")):
        for j, (regime, title) in enumerate((("block", "blocks of 512"), ("step", "token by token"))):
            for policy, (label, color) in LINES.items():
                # the full cache computes the same either way, and was read in blocks
                wanted = (kind, 0, "block") if policy == "full" else (kind, M, regime)
                mine = [r for r in rows if r["policy"] == policy and (r["kind"], r["mem_size"], r["regime"]) == wanted]
                points = sorted((r["context"], r["perplexity"]) for r in mine)
                axes[i, j].plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=4)
            axes[0, j].set_title(title)
            axes[i, j].set(
                xscale="log", xticks=[2048, 4096, 8192], xlim=(1700, 9900), xticklabels=["2,048", "4,096", "8,192"]
            )
            axes[i, j].minorticks_off()
            axes[1, j].set_xlabel("tokens of context")
        axes[i, 0].set_ylabel(f"perplexity, {kind}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out / "quality.svg", metadata={"Date": None})


def cpu(out: Path) -> None:
    """Milliseconds a token over the tokens read before."""
    d = read("benchmarks/cpu.json")
    ours = {512: d["context_512"]["lococo"], 1000: d["position_1000"], 8192: d["context_8192"]["lococo"],
            100_000: d["position_100000"]}  # fmt: skip
    theirs = {n: d[f"context_{n}"]["transformers"] for n in (512, 8192)}
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for label, points, color in (
        ("transformers, growing cache", theirs, "0.6"),
        (f"{d['mem_size']} slots", ours, "C0"),
    ):
        axes.plot(list(points), [p["p50_ms"] for p in points.values()], "o-", color=color, label=label, markersize=4)
    axes.set(xscale="log", xlabel="tokens read before", ylabel="ms a token, median", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(out / "cpu.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "lococo", "font.size": 9})
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images"
    quality(folder)
    cpu(folder)
