"""Entry points of the commands whose packages import much: a missing extra is one line, and Ctrl-C meanwhile is 130."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from ._exceptions import NotFoundError
from .cli import guarded


def _command(module: str, function: str) -> Callable[[Sequence[str] | None], int]:
    """The function `function` of `module`, which is imported when it is called."""

    def main(argv: Sequence[str] | None = None) -> int:
        def run() -> int:
            try:
                command = getattr(importlib.import_module(module), function)
            except ModuleNotFoundError as e:
                raise NotFoundError(str(e)) from e
            status: int = command(argv)
            return status

        return guarded(run)

    return main


export_main = _command("lococo_export.cli", "export_main")
verify_main = _command("lococo_export.cli", "verify_main")
build_main = _command("lococo_engines.cli", "main")
fit_main = _command("lococo_calibration.cli", "fit_main")
eval_main = _command("lococo_calibration.cli", "eval_main")
serve_main = _command("lococo_server.cli", "main")
bench_main = _command("lococo_bench.cli", "main")
