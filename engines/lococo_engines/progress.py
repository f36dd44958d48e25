"""TensorRT's progress as one line on a terminal."""

from __future__ import annotations

import sys
from typing import Any, TextIO

_WIDTH = 24


def make_monitor(trt: Any, label: str, stream: TextIO = sys.stderr) -> Any | None:
    """A trt.IProgressMonitor that draws on `stream`; None where TensorRT has none (8.6) or `stream` is no terminal.

    Ctrl-C cancels the build; `interrupted` says so afterwards.
    """
    if not hasattr(trt, "IProgressMonitor") or not stream.isatty():
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                draw(stream, label, phase_name, step + 1, self.steps.get(phase_name, 0))
            except KeyboardInterrupt:  # must not pass through TensorRT's C++
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)
            if not self.steps:
                stream.write("\r\x1b[K")
                stream.flush()

    return Monitor()


def draw(stream: TextIO, label: str, phase: str, done: int, total: int) -> None:
    """Redraws the line: label, bar, phase."""
    filled = _WIDTH * min(done, total) // max(total, 1)
    stream.write(f"\r\x1b[K  {label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total} {phase[:40]}")
    stream.flush()
