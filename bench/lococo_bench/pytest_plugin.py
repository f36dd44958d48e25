"""A fixture that fails a test when a bundle has become slower.

    def test_latency(lococo_latency):
        lococo_latency("bundle", "latency.json", n_gen=(128,), n_depth=(0, 4096), fail_above=1.05)

`pytest --lococo-update-baseline` writes latency.json instead. On other hardware than the baseline's the test skips.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from .regression import Comparison


class CheckLatency(Protocol):
    """What the fixture gives."""

    def __call__(
        self,
        bundle: str | os.PathLike[str],
        baseline: str | os.PathLike[str],
        *,
        fail_above: float = 1.05,
        device: str = "cpu",
        backend: str = "onnxruntime",
        num_threads: int = 0,
        **plan: Any,
    ) -> Comparison | None:
        """Measures `bundle` and compares medians with `baseline`, a file of lococo-bench -o json.

        Args:
            plan: as `lococo_bench.Plan`.

        Returns:
            the comparison, None if the baseline was written.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("lococo").addoption(
        "--lococo-update-baseline", action="store_true", help="lococo_latency: write baselines instead of comparing"
    )


@pytest.fixture
def lococo_latency(request: pytest.FixtureRequest) -> CheckLatency:
    """Fails the test if a bundle's medians are above a recorded baseline's; skips it on other hardware."""

    def check(
        bundle: str | os.PathLike[str],
        baseline: str | os.PathLike[str],
        *,
        fail_above: float = 1.05,
        device: str = "cpu",
        backend: str = "onnxruntime",
        num_threads: int = 0,
        **plan: Any,
    ) -> Comparison | None:
        # not at the top: pytest imports this module in every run, whatever it tests
        from . import Bench, Plan, compare, format_rows, read_rows

        path, update = Path(baseline), bool(request.config.getoption("--lococo-update-baseline"))
        settings = Plan(**{"n_prompt": (), **plan})
        if not update and not path.is_file():
            pytest.fail(f"{path}: no baseline; record one with pytest --lococo-update-baseline", pytrace=False)
        with Bench(bundle, device=device, backend=backend, num_threads=num_threads) as bench:
            rows = list(bench.run(settings))
        if update:
            path.write_text(format_rows(rows, "json"), encoding="utf-8")
            return None
        comparison = compare(read_rows(path), rows, fail_above)
        if comparison.skipped:
            pytest.skip(str(comparison))
        if comparison.failed:
            pytest.fail(str(comparison), pytrace=False)
        return comparison

    return check
