"""Draws docs/images/slots.svg: which tokens of a text the slots of two layers hold, in what shares, after fusions.

Usage: plot_slots.py CHECKPOINT TEXT_FILE OUT.svg
CHECKPOINT is a model directory with fusion heads. Read in blocks, in float32, by the reference model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer

from lococo_export import load_checkpoint
from lococo_export.reference import FusionEvent, ReferenceModel, ReferenceSession

BLOCKS, HEAD, SMALLEST = 4, 0, 0.005


def main() -> None:
    folder, text, out = sys.argv[1:]
    checkpoint = load_checkpoint(folder)
    ids = Tokenizer.from_file(str(Path(folder, "tokenizer.json"))).encode(Path(text).read_text(encoding="utf-8")).ids
    count = BLOCKS * checkpoint.config.block_size
    normalizers = [head.normalizer for head in checkpoint.heads]
    layers = [min(range(len(normalizers)), key=normalizers.__getitem__), normalizers.index(max(normalizers))]
    shares = {layer: torch.zeros(0, count) for layer in layers}  # (slots, tokens), rows add up to 1

    def follow(event: FusionEvent) -> None:
        if event.layer not in shares:
            return
        old, chosen, n = shares[event.layer], event.fused.selection, normalizers[event.layer]
        first = 0 if len(old) == 0 else position
        new = torch.eye(count)[first : first + int(event.length) - len(old)]  # tokens read since the last fusion
        columns = torch.cat([old, new])
        rest = columns[chosen.rest[0, HEAD, : int(chosen.rest_length)]]
        mixing = event.fused.mixing[0, HEAD, :, : len(rest)]
        mixed = (1 - n) * rest[chosen.residual[0, HEAD]] + n * mixing @ rest
        shares[event.layer] = torch.cat([columns[chosen.keep[0, HEAD]], mixed])

    session = ReferenceSession(ReferenceModel(checkpoint), on_fusion=follow)
    for position in range(0, count, checkpoint.config.block_size):
        session.read(torch.tensor([ids[position : position + checkpoint.config.block_size]]), return_all=False)

    plt.rcParams.update({"svg.hashsalt": "lococo", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained", sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        slot, token = torch.nonzero(shares[layer] > SMALLEST, as_tuple=True)
        share = shares[layer][slot, token]
        ax.axhspan(0, checkpoint.config.keep, color="0.94", zorder=0)
        points = ax.scatter(token, slot, c=share, s=2, vmin=0, vmax=1, cmap="viridis_r", rasterized=True)
        ax.set(title=f"layer {layer}, n = {normalizers[layer]:.2f}", xlabel="token of the text", xlim=(0, count))
    axes[0].set(ylabel="slot (grey: kept verbatim)", ylim=(checkpoint.config.mem_size, 0))
    figure.colorbar(points, ax=axes, label="share of the token in the slot")
    figure.savefig(out, metadata={"Date": None}, dpi=150)


if __name__ == "__main__":
    main()
