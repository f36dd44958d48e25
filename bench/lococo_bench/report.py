"""Rows to text, and to a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo_runtime import InvalidArgumentError, NotFoundError, StorageError

from .measure import Row

FORMATS = ("md", "json", "jsonl", "csv")


def test_name(row: Row) -> str:
    """Such as "tg128 @ d4096", as llama-bench says it."""
    kind = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    return kind + (f" @ d{row['n_depth']}" if row["n_depth"] else "")


def test_key(row: Row) -> tuple[str, int, int, int]:
    """What makes two rows the same test."""
    return row["implementation"], row["n_prompt"], row["n_gen"], row["n_depth"]


def add_ratios(rows: Sequence[Row]) -> None:
    """Sets `ratio_to_lococo` of the other implementations' rows: how many times our median theirs takes."""
    ours = {test_key(row)[1:]: row for row in rows if row["implementation"] == "lococo"}
    for row in rows:
        if row["implementation"] != "lococo" and (own := ours.get(test_key(row)[1:])):
            row["ratio_to_lococo"] = statistics.median(row["samples_ns"]) / statistics.median(own["samples_ns"])


def format_rows(rows: Sequence[Row], kind: str) -> str:
    """All rows as "json" (an array), "jsonl", "csv" or "md", with a newline at the end."""
    if kind == "json":
        return json.dumps(rows, indent=1) + "\n"
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        return _csv(rows)
    if kind == "md":
        return _markdown(rows)
    raise InvalidArgumentError(f"output: expected one of {', '.join(FORMATS)}, got {kind!r}")


def read_rows(path: Path) -> list[Row]:
    """Rows of a file written as json or jsonl.

    Raises:
        NotFoundError, StorageError: no such file, or one that cannot be read.
        InvalidArgumentError: another content.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
        for row in rows:
            test_key(row)
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found; write it with lococo-bench -o json") from e
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidArgumentError(f"{path}: expected rows of lococo-bench -o json or jsonl: {e}") from e
    if not rows:
        raise InvalidArgumentError(f"{path}: expected rows of lococo-bench, got none")
    return list(rows)


def _flat(row: Row, prefix: str = "") -> Row:
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return out


def _csv(rows: Sequence[Row]) -> str:
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _markdown(rows: Sequence[Row]) -> str:
    """llama-bench's table, and what is ours: time to first token, steps apart, windows, memory, ratio."""
    header = ["model", "size", "implementation", "backend", "test", "t/s", "TTFT ms", "plain ms", "fusion ms"]
    header += ["window ms", "p99 ms", "memory", "x lococo"]
    table = [header]
    for row in rows:
        ratio = row.get("ratio_to_lococo")
        table.append(
            [
                row["model_type"],
                _mib(row["model_size"]),
                row["implementation"],
                f"{row['backend']} {row['device']}",
                test_name(row),
                f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
                *(_middle(row, k) for k in ("ttft_ms", "plain_step_ms", "fusion_step_ms", "window_ms_per_token")),
                _middle(row, "plain_step_ms", "p99"),
                _mib(row.get("peak_memory_bytes")),
                f"{ratio:.2f}" if ratio else "",
            ]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    first = rows[0] if rows else {}
    about = [f"{k} {first[k]}" for k in ("gpu_info", "cpu_info", "power_mode", "build_commit") if first.get(k)]
    return "\n".join([*lines, "", "; ".join(about)]) + "\n"


def _mib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:.1f} MiB"


def _middle(row: Row, key: str, cut: str = "p50") -> str:
    values = row.get(key)
    return f"{values[cut]:.3f}" if values else ""


def check_plot(path: Path) -> None:
    """Whether a plot can be drawn to `path`; to be asked before minutes of measuring.

    Raises:
        NotFoundError: matplotlib is missing.
        InvalidArgumentError: a kind of file that matplotlib does not know.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as e:
        raise NotFoundError(f"--plot: {e}; pip install 'lococo-export[bench]'") from e
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InvalidArgumentError(f"--plot: expected a name that ends in one of {', '.join(kinds)}, got {path.name!r}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws milliseconds a token and peak memory against depth, a line for each implementation.

    Args:
        rows: of generation, at several depths.
        path: its suffix says the kind of file, such as .svg or .png.

    Raises:
        NotFoundError, InvalidArgumentError: as `check_plot`, or no rows of generation.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    generated = sorted((row for row in rows if row["n_gen"]), key=lambda row: row["n_depth"])
    if not generated:
        raise InvalidArgumentError("--plot: expected rows of generation, got none; pass -n")
    figure = Figure(figsize=(10, 4), layout="constrained")
    latency, memory = figure.subplots(1, 2)
    for implementation in dict.fromkeys(row["implementation"] for row in generated):
        own = [row for row in generated if row["implementation"] == implementation]
        lines: dict[str, Any] = {
            "": [(r["n_depth"], statistics.median(r["samples_ns"]) / 1e6 / r["n_gen"]) for r in own]
        }
        if implementation == "lococo":
            for name, key in (("plain step", "plain_step_ms"), ("fusion step", "fusion_step_ms")):
                lines[f", {name}"] = [(r["n_depth"], r[key]["p50"]) for r in own if r.get(key)]
        for name, points in lines.items():
            if points:
                latency.plot(*zip(*points, strict=True), marker="o", label=implementation + name)
        sizes = [(r["n_depth"], r["peak_memory_bytes"] / 2**20) for r in own if r.get("peak_memory_bytes")]
        if sizes:
            memory.plot(*zip(*sizes, strict=True), marker="o", label=implementation)
    first = generated[0]
    figure.suptitle(f"{first['model_type']}, {first['mem_size']} slots, {first.get('gpu_info') or first['cpu_info']}")
    for axes, label in ((latency, "ms a token, median"), (memory, "peak memory, MiB")):
        axes.set_xscale("symlog", linthresh=512)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel(label)
        axes.set_yscale("log")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path)
