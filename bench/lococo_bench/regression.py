"""Medians of two runs, on the same hardware."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lococo_runtime import InvalidArgumentError

from .measure import Row
from .report import test_key, test_name

FAIL_ABOVE = 1.05  # times as long as before
HARDWARE = ("device", "gpu_info", "cpu_info", "n_threads", "power_mode")
MODEL = ("backend", "model_type", "policy", "mem_size", "n_batch")
SUMMARIES = ("ttft_ms", "plain_step_ms", "fusion_step_ms", "window_ms_per_token")


@dataclass(frozen=True)
class Change:
    """The median of a `metric` of a `test`, then and now: `old_ms` and `new_ms`, in milliseconds."""

    test: str
    metric: str
    old_ms: float
    new_ms: float

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.new_ms / self.old_ms


@dataclass(frozen=True)
class Comparison:
    """What became of the tests that a baseline has too.

    Attributes:
        changes: every median in both runs; none if the hardware or the model differs.
        fail_above: the largest ratio that passes.
        skipped: why nothing was compared, "" if something was.
    """

    changes: list[Change]
    fail_above: float
    skipped: str = ""

    @property
    def failed(self) -> list[Change]:
        """Changes above the limit."""
        return [change for change in self.changes if change.ratio > self.fail_above]

    def __str__(self) -> str:
        if self.skipped:
            return f"SKIPPED: not compared with the baseline: {self.skipped}"
        lines = [f"{'test':<24} {'median of':<20} {'baseline ms':>12} {'now ms':>12} {'ratio':>7}"]
        for c in self.changes:
            verdict = f"  above {self.fail_above:g}" if c in self.failed else ""
            lines.append(f"{c.test:<24} {c.metric:<20} {c.old_ms:>12.4f} {c.new_ms:>12.4f} {c.ratio:>7.3f}{verdict}")
        slower = f"{len(self.failed)} slower" if self.failed else "none slower"
        lines.append(f"{slower} than {self.fail_above:g} times the baseline, of {len(self.changes)}")
        return "\n".join(lines)


def compare(baseline: Sequence[Row], rows: Sequence[Row], fail_above: float = FAIL_ABOVE) -> Comparison:
    """Compares the medians of every test that both runs have, if the hardware is the same.

    Args:
        baseline, rows: of `lococo-bench -o json`.
        fail_above: largest ratio of new to old that passes, at least 1.

    Raises:
        InvalidArgumentError: a limit below 1, other models, or no test in common: then nothing would ever fail.
    """
    if not fail_above >= 1:
        raise InvalidArgumentError(f"fail_above: expected at least 1, got {fail_above}")
    old, new = ({test_key(row): row for row in side if row["implementation"] == "lococo"} for side in (baseline, rows))
    if not old or not new:
        raise InvalidArgumentError("baseline: expected rows of implementation lococo in both runs")
    if other := _differing(HARDWARE, old, new):
        return Comparison([], fail_above, f"other hardware: {other}")
    if other := _differing(MODEL, old, new):
        raise InvalidArgumentError(f"baseline: of another model or backend: {other}; record a new one")
    common = [key for key in new if key in old]
    if not common:
        tests = ", ".join(test_name(row) for row in old.values())
        raise InvalidArgumentError(f"baseline: no test in common; it has {tests}: pass the same -p, -n and -d")
    return Comparison([change for key in common for change in _changes(old[key], new[key])], fail_above)


def _differing(
    names: Sequence[str], old: dict[tuple[str, int, int, int], Row], new: dict[tuple[str, int, int, int], Row]
) -> str:
    a, b = next(iter(old.values())), next(iter(new.values()))
    return "; ".join(f"{n}: baseline {a.get(n)!r}, here {b.get(n)!r}" for n in names if a.get(n) != b.get(n))


def _changes(old: Row, new: Row) -> list[Change]:
    name = test_name(new)
    medians = [statistics.median(row["samples_ns"]) / 1e6 for row in (old, new)]
    changes = [Change(name, "whole test", *medians)]
    for key in SUMMARIES:
        if old.get(key) and new.get(key):
            changes.append(Change(name, key, old[key]["p50"], new[key]["p50"]))
    return changes
