"""Every public name is documented, in C and in Python, and the reference pages build."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lococo_runtime", "lococo_export", "lococo_engines", "lococo_calibration")


@pytest.fixture(scope="module")
def c_header() -> Any:
    """docs/c_header.py"""
    pytest.importorskip("clang.cindex", reason="needs libclang; install lococo-export[docs]")
    pytest.importorskip("sphinx", reason="needs sphinx; install lococo-export[docs]")
    spec = importlib.util.spec_from_file_location("c_header", ROOT / "docs/c_header.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["c_header"] = module
    spec.loader.exec_module(module)
    return module


def test_every_name_of_the_header_has_a_comment(c_header: Any) -> None:
    entries = c_header.read_header(ROOT / "runtime/include/lococo.h")
    names = {e.name for e in entries}
    assert {"LOCOCO_ABI_VERSION", "lococo_model", "lococo_status", "lococo_options", "lococo_session_prefill"} <= names
    assert [e.name for e in entries if not e.text] == []
    assert [f"{e.name}.{m.name}" for e in entries for m in e.members if not m.text] == []


def test_what_has_no_comment_is_found(c_header: Any, tmp_path: Path) -> None:
    header = tmp_path / "small.h"
    header.write_text(
        """/* preamble */
#include <stdint.h>
/* documented */
#define LOCOCO_A 1
#define LOCOCO_B 2

#define LOCOCO_C 3
#define LOCOCO_D 4 /* trailing */
/* --- section ----- */

typedef struct lococo_s {
  int32_t x; /* documented */
  int32_t y;
} lococo_s;
/* documented */
int lococo_f(void);
int lococo_g(void);
"""
    )
    entries = {e.name: e for e in c_header.read_header(header)}
    assert {name for name, e in entries.items() if not e.text} == {"LOCOCO_C", "lococo_s", "lococo_g"}
    assert [bool(m.text) for m in entries["lococo_s"].members] == [True, False]


def undocumented(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    exported = {name: getattr(module, name) for name in module.__all__}
    protocols = [value for value in exported.values() if getattr(value, "_is_protocol", False)]
    for name, value in exported.items():
        if not callable(value):
            continue
        text = value.__doc__ or ""
        if not text.strip() or text.startswith(f"{name}("):  # what dataclasses make up
            yield f"{package}.{name}"
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            public = not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, property))
            said = [
                inspect.getdoc(getattr(kind, member, None)) for kind in (value, *protocols) if hasattr(kind, member)
            ]
            if public and not any(said):
                yield f"{package}.{name}.{member}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_python_name_has_a_docstring(package: str) -> None:
    assert list(undocumented(package)) == []


def test_the_pages_build(c_header: Any, tmp_path: Path) -> None:
    """Without a warning: a docstring that is no reStructuredText is one."""
    for name in ("myst_parser", "furo"):
        pytest.importorskip(name, reason=f"needs {name}; install lococo-export[docs]")
    command = (sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", ROOT / "docs", tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "reference/c.html").read_text(encoding="utf-8")
    assert 'id="c.lococo_session_prefill"' in page
    assert 'id="lococo_runtime.Session.prefill"' in (tmp_path / "reference/python.html").read_text(encoding="utf-8")
