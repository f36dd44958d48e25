"""Draws docs/images/cache.svg: slots in use while a real text is read, recorded from a session.

Usage: plot_cache.py BUNDLE TEXT_FILE OUT.svg
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from lococo_runtime import Session
from lococo_runtime.llm import load_tokenizer

BLOCKS, STEPS = 4, 120


def main() -> None:
    bundle, text, out = sys.argv[1:]
    with open(text, encoding="utf-8") as f:
        ids = load_tokenizer(bundle).encode(f.read()).ids
    positions, live = [0], [0]
    with Session(bundle) as session:
        cache = session.model.manifest.cache
        prompt = BLOCKS * cache.block_size
        for first in range(0, prompt, cache.block_size):
            session.prefill(ids[first : first + cache.block_size])
            positions.append(session.position)
            live.append(session.live_slots)
        for token in ids[prompt : prompt + STEPS]:
            session.step(token)
            positions.append(session.position)
            live.append(session.live_slots)
    plt.rcParams.update({"svg.hashsalt": "lococo", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([0, positions[-1]], [0, positions[-1]], "--", color="0.6", label="ordinary KV cache: one slot a token")
    axes.step(positions, live, where="post", color="C0", label="slot cache, live slots")
    axes.axhline(cache.capacity, color="C3", linewidth=0.8, label=f"capacity, M + buffer = {cache.capacity}")
    axes.axvspan(prompt, positions[-1], color="C2", alpha=0.12, label="token by token")
    axes.set(xlabel="tokens read", ylabel="slots", xlim=(0, positions[-1]), ylim=(0, 3 * cache.capacity))
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
