"""Plots of what lococo-eval measured. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo_runtime._exceptions import UnsupportedError
from lococo_runtime.bundle import storage_error

from .evaluate import PasskeyRow, PerplexityRow


def plot(rows: Sequence[PerplexityRow], passkey: Sequence[PasskeyRow], folder: Path) -> list[Path]:
    """Perplexity over context, and share of pass keys found over depth, as PNG and SVG files.

    Raises:
        UnsupportedError: matplotlib is not installed.
        StorageError: the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise UnsupportedError("--plots needs matplotlib: pip install 'lococo-export[fit-all]'") from e

    figures: dict[str, Any] = {}
    if rows:
        figure = figures["perplexity"] = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for label in dict.fromkeys(_line(r) for r in rows):
            mine = [r for r in rows if _line(r) == label]
            axes.plot([r.context for r in mine], [r.perplexity for r in mine], marker="o", label=label)
        axes.set(xlabel="context, tokens", ylabel="perplexity", xscale="log")
        axes.set_xticks(contexts := sorted({r.context for r in rows}), [f"{c:,}" for c in contexts])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    if passkey:
        parts = sorted({(r.haystack, r.context) for r in passkey})
        figure = figures["passkey"] = Figure(figsize=(1 + 4 * len(parts), 4), layout="constrained")
        for axes, (haystack, context) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            at = [r for r in passkey if (r.haystack, r.context) == (haystack, context)]
            for label in dict.fromkeys(map(_line, at)):
                line = [r for r in at if _line(r) == label]
                axes.plot([r.depth for r in line], [r.correct / r.trials for r in line], marker="o", label=label)
            axes.set(
                title=f"{context:,} tokens of {haystack}", xlabel="depth of the key", ylabel="found", ylim=(-0.05, 1.05)
            )
            axes.legend(fontsize="small")
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"{name}.{suffix}", dpi=150)
                paths.append(folder / f"{name}.{suffix}")
    except OSError as e:
        raise storage_error(e, folder) from e
    return paths


def _line(row: PerplexityRow | PasskeyRow) -> str:
    parts = [row.policy, f"M={row.mem_size}" if row.mem_size else ""]
    parts += [row.regime if isinstance(row, PerplexityRow) and row.mem_size else ""]
    parts += [row.backend if row.backend != "pytorch" else ""]
    return " ".join(p for p in parts if p)
