"""Measures bundles: latency, throughput and memory at any depth, beside PyTorch, and against an earlier run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .against import Against
    from .device import open_device
    from .measure import Bench, Plan, Row
    from .regression import Change, Comparison, compare
    from .report import add_ratios, format_rows, plot, read_rows

__all__ = [
    "Against",
    "Bench",
    "Change",
    "Comparison",
    "Plan",
    "Row",
    "add_ratios",
    "compare",
    "format_rows",
    "open_device",
    "plot",
    "read_rows",
]

_HOMES = {
    "against": ("Against",),
    "device": ("open_device",),
    "measure": ("Bench", "Plan", "Row"),
    "regression": ("Change", "Comparison", "compare"),
    "report": ("add_ratios", "format_rows", "plot", "read_rows"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: pytest imports this package in every run, for its plugin."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names too that are not imported yet."""
    return sorted({*globals(), *__all__})
