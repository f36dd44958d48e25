"""scripts/gpu_host, as far as it goes without a GPU: it runs every test of one, and its parts report for themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu_host"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def bash(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_every_test_of_a_gpu_is_run() -> None:
    """Those marked gpu, and those of the fixture `backend`, which has GPUs among its parameters."""
    with_gpu = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"mark\.gpu\b|\bbackend: Backend\b", path.read_text(encoding="utf-8")) and path != Path(__file__)
    }
    named = re.findall(r"tests/test_\S+\.py", SCRIPT.read_text(encoding="utf-8"))
    run = bash("-c", f"echo {' '.join(named)}").stdout.split()  # with what is in braces
    assert sorted(run) == sorted(with_gpu)


def test_parts_are_what_the_first_lines_say() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    said = re.search(r"^#     (compile .*)$", text, re.MULTILINE)
    default = re.search(r"parts=\((compile .*)\)$", text, re.MULTILINE)
    assert said is not None
    assert default is not None
    assert said[1] == default[1]
    functions = set(re.findall(r"^([a-z_-]+)\(\) \{", text, re.MULTILINE))
    assert functions == {*said[1].split(), "host", "build_engines", "measure"}
    assert said[1] in bash(str(SCRIPT)).stdout  # the usage


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    parts = ["compile", "nonsense", "compile"]
    done = bash(str(SCRIPT), str(tmp_path / "out"), *parts, WORK=str(tmp_path / "work"), TENSORRT_INCLUDE="")
    assert done.returncode == 1, done.stderr
    assert "TENSORRT_INCLUDE" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/parts.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == parts
    assert all(row["exit"] != 0 for row in rows)


def test_shapes_of_the_benchmark_are_documented() -> None:
    said = re.search(r"shape: ([^()]+) \(default\), ([\w-]+),\n", SCRIPT.read_text(encoding="utf-8"))
    assert said is not None
    bundles = (ROOT / "scripts/gpu_bundles.py").read_text(encoding="utf-8")
    assert list(said.groups()) == re.findall(r'^    "([\w.-]+)": \{', bundles, re.MULTILINE)
