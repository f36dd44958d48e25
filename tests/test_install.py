"""lococo_runtime needs numpy and the standard library, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lococo_runtime
import numpy as np
import pytest

# Prints the modules that importing the package and every submodule brings in, and the mapped native libraries.
PROBE = """
import importlib, importlib.util, json, pkgutil, sys
before = set(sys.modules)
import lococo_runtime
names = [m.name for m in pkgutil.walk_packages(lococo_runtime.__path__, "lococo_runtime.")]
names = [name for name in names if importlib.util.find_spec(name).origin.endswith(".py")]  # not liblococo.so
for name in names:
    importlib.import_module(name)
print(json.dumps({
    "submodules": names,
    "new": sorted(set(sys.modules) - before),
    "maps": open("/proc/self/maps").read() if sys.platform == "linux" else "",
}))
"""


def probe(*options: str, path: Path | None = None) -> dict[str, list[str] | str]:
    prefix = f"import sys; sys.path.append({str(path)!r})\n" if path else ""
    result = subprocess.run(
        [sys.executable, *options, "-c", prefix + PROBE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def empty_environment(tmp_path: Path) -> Path:
    """A folder that holds numpy and lococo_runtime alone."""
    numpy = Path(np.__file__).parent
    for package in (numpy, numpy.with_name("numpy.libs"), Path(lococo_runtime.__file__).parent):
        if package.exists():
            (tmp_path / package.name).symlink_to(package)
    return tmp_path


def test_every_submodule_imports_in_an_otherwise_empty_environment(empty_environment: Path) -> None:
    found = probe("-I", "-S", path=empty_environment)
    package = Path(lococo_runtime.__file__).parent
    expected = {f"lococo_runtime.{file.stem}" for file in package.glob("*.py") if file.stem != "__init__"}
    assert set(found["submodules"]) == expected


def test_nothing_else_is_imported_where_more_is_installed() -> None:
    new = {name.partition(".")[0] for name in probe()["new"]}
    ours = {"numpy", "lococo_runtime", "cython_runtime"}
    others = {name for name in new - ours - sys.stdlib_module_names if not name.startswith("_cython_")}
    assert not others


def test_native_code_is_loaded_on_first_use_only() -> None:
    maps = probe()["maps"]
    assert "liblococo" not in maps
    assert "libonnxruntime" not in maps


def test_public_names() -> None:
    """Public is what __all__ says: no private module leaks a name into the package."""
    modules = {name for name, value in vars(lococo_runtime).items() if type(value) is type(sys)}
    public = {name for name in vars(lococo_runtime) if not name.startswith("_")} - modules
    assert public == set(lococo_runtime.__all__)
