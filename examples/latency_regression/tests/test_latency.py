"""The `lococo_latency` fixture comes with lococo-export; pytest finds it by itself."""

from __future__ import annotations

import os
from pathlib import Path

from lococo_bench.pytest_plugin import CheckLatency

BUNDLE = os.environ.get("READER_BUNDLE", "bundle")
BASELINE = Path(__file__).with_name("latency.json")


def test_latency(lococo_latency: CheckLatency) -> None:
    """Reading, and single tokens at the start and far into a text, take at most 1.1 times what they took."""
    lococo_latency(
        BUNDLE,
        BASELINE,
        fail_above=1.1,
        n_prompt=(512,),
        n_gen=(32,),
        n_depth=(0, 1 << 20),
        depth_by="position",  # a million tokens need not be read: a state costs the same at any position
    )
