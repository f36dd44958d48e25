"""Every public name is documented, in C and in Python, and the reference pages build."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from commands import COMMANDS, parser_of

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "lococo_runtime",
    "lococo_export",
    "lococo_engines",
    "lococo_calibration",
    "lococo_bench",
    "lococo_server",
)


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))


def parsers() -> dict[str, argparse.ArgumentParser]:
    return {name: parser_of(name) for name in COMMANDS}


@pytest.fixture(scope="module")
def c_header() -> Any:
    """docs/c_header.py"""
    for name in ("clang.cindex", "sphinx", "myst_parser", "furo", "sphinx_argparse_cli"):
        pytest.importorskip(name, reason=f"needs {name}; install lococo-export[docs]")
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
        for member, function in public_members(value):
            public = inspect.isroutine(function) or isinstance(function, property | functools.cached_property)
            said = [
                inspect.getdoc(getattr(kind, member, None)) for kind in (value, *protocols) if hasattr(kind, member)
            ]
            if public and not any(said):
                yield f"{package}.{name}.{member}"
        for item in dataclasses.fields(value) if inspect.isclass(value) and dataclasses.is_dataclass(value) else ():
            said = [f"\\b{item.name}\\b", text], [rf'^    {item.name}:[^\n]*\n    """', inspect.getsource(value)]
            if not item.metadata.get("help") and not any(re.search(*words, re.MULTILINE) for words in said):
                yield f"{package}.{name}.{item.name}"
        for attribute in made_in_init(value):
            said = [(rf"\b{attribute}\b", inspect.getdoc(kind) or "") for kind in own_classes(value)]
            said += [(rf'self\.{attribute}\b[^\n]*\n +"""', inspect.getsource(kind)) for kind in own_classes(value)]
            if not any(re.search(*words) for words in said):
                yield f"{package}.{name}.{attribute}"


def own_classes(value: Any) -> list[type]:
    """A class and those of this project that it inherits from."""
    classes = inspect.getmro(value) if inspect.isclass(value) else ()
    return [kind for kind in classes if kind.__module__.partition(".")[0] in PACKAGES]


def public_members(value: Any) -> Iterator[tuple[str, Any]]:
    """Of a class, inherited ones of this project included."""
    for kind in own_classes(value):
        yield from ((name, member) for name, member in vars(kind).items() if not name.startswith("_"))


def made_in_init(value: Any) -> set[str]:
    """Public attributes that a class sets when it is made."""
    nodes = [
        node
        for kind in own_classes(value)
        if "__init__" in vars(kind) and not dataclasses.is_dataclass(kind)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind.__init__))))
    ]
    targets = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in targets if ast.unparse(node.value) == "self" and not node.attr.startswith("_")}


def test_what_has_no_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import lococo_runtime

    class Base:
        def inherited(self) -> None: ...

    class Public(Base):
        """Has kept."""

        def __init__(self) -> None:
            self.kept, self.bare, self._hidden = 1, 2, 3
            self.below = 4
            """It is said here."""

        @classmethod
        def made(cls) -> None: ...

        @staticmethod
        def still() -> None: ...

        @functools.cached_property
        def cached(self) -> int:
            return 0

        def said(self) -> None:
            """It is said."""

    monkeypatch.setattr(sys.modules[__name__], "PACKAGES", (__name__,))
    monkeypatch.setattr(lococo_runtime, "Public", Public, raising=False)
    monkeypatch.setattr(lococo_runtime, "__all__", ["Public"])
    found = {name.removeprefix("lococo_runtime.Public.") for name in undocumented("lococo_runtime")}
    assert found == {"inherited", "bare", "made", "still", "cached"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_python_name_has_a_docstring(package: str) -> None:
    assert list(undocumented(package)) == []


def test_every_flag_has_a_help_text() -> None:
    said = {f"{name} {a.option_strings or a.dest}": a.help for name, p in parsers().items() for a in p._actions}
    assert len(said) > 100
    assert [flag for flag, text in said.items() if not text] == []


def test_the_pages_build_with_every_public_name(c_header: Any, tmp_path: Path) -> None:
    """Without a warning: a docstring that is no reStructuredText is one, a page that is in no menu too."""
    command = (sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", ROOT / "docs", tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    python = {f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__}
    assert python - anchors(tmp_path / "reference/python.html") == set()
    header = c_header.read_header(ROOT / "runtime/include/lococo.h")
    names = {f"c.{e.name}" for e in header} | {
        f"c.{e.name}.{m.name}" for e in header for m in e.members if e.kind == "struct"
    }
    assert names - anchors(tmp_path / "reference/c.html") == set()
    flags = {f"{name}-{flag}" for name, p in parsers().items() for a in p._actions for flag in a.option_strings}
    assert flags - anchors(tmp_path / "reference/cli.html") == set()
    # a link out of the site becomes one within its page, to a place that is not
    for page in tmp_path.rglob("*.html"):
        within = re.findall(r'href="#([^"]+)"', page.read_text(encoding="utf-8"))
        assert {unquote(name) for name in within} - anchors(page) == set(), page
