"""The C package: the header by itself, and programs built against an installed prefix and against the wheel."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lococo_runtime import Model, SamplingParams, Session, _c_api
from tiny_models import make_model

from lococo_export import export_bundle, load_checkpoint

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "runtime/include/lococo.h"
EXAMPLES = ROOT / "examples/c"
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
QUICK = "-O0"  # the library is built twice here
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja may be there


def run(*command: str | Path, stdin: str = "", cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **environment},
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def tool(*names: str) -> str:
    """The first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name, path=PATH):
            return path
    pytest.skip(f"needs {' or '.join(names)}")


def find_compilers(family: str) -> tuple[str, str]:
    """A C and a C++ compiler of one family."""
    if family == "gcc":
        return tool("gcc"), tool("g++")
    versions = [str(n) for n in range(25, 10, -1)]
    return tool("clang", *(f"clang-{n}" for n in versions)), tool("clang++", *(f"clang++-{n}" for n in versions))


@pytest.fixture(params=["gcc", "clang"])
def compilers(request: pytest.FixtureRequest) -> tuple[str, str]:
    return find_compilers(request.param)


# --- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "standard"),
    [*(("lococo.h", s) for s in ("c11", "c17", "c++11", "c++17")), *(("lococo.hpp", s) for s in ("c++11", "c++17"))],
)
def test_header_compiles_alone(compilers: tuple[str, str], name: str, standard: str, tmp_path: Path) -> None:
    plus = standard.startswith("c++")
    source = tmp_path / ("main.cc" if plus else "main.c")
    body = "int main(void) { return lococo_abi_version() == LOCOCO_ABI_VERSION; }"
    source.write_text(f'#include "{name}"\n#include "{name}"\n{body}\n')
    run(compilers[plus], f"-std={standard}", *STRICT, f"-I{HEADER.parent}", "-c", source, "-o", tmp_path / "main.o")


def numbers() -> dict[str, str]:
    """The plain numbers that lococo.h defines."""
    return dict(re.findall(r"^#define LOCOCO_(\w+) (\d+)$", HEADER.read_text(), re.MULTILINE))


def test_one_version() -> None:
    n = numbers()
    version = f"{n['VERSION_MAJOR']}.{n['VERSION_MINOR']}.{n['VERSION_PATCH']}"
    assert importlib.metadata.version("lococo-export") == version
    assert _c_api.library().lococo_version().decode() == version
    assert str(_c_api.ABI_VERSION) == n["ABI_VERSION"]


def test_python_declares_and_the_library_exports_what_the_header_does() -> None:
    declared = set(re.findall(r"\b(lococo_\w+)\([^)]", re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)))
    declared = {name for name in declared if not name.endswith("_fn")}
    assert declared == set(_c_api._PROTOTYPES)
    library = ctypes.CDLL(str(_c_api.library_path()))
    assert [name for name in declared if not hasattr(library, name)] == []


# --- built against an installation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """Where lococo was installed, and what a user types to find it."""

    library: Path
    cmake_dir: str
    pkgconfig_dir: str


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """What `cmake --install` leaves, moved to another place."""
    root = tmp_path_factory.mktemp("prefix")
    configure = ("-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={QUICK}", f"-DCMAKE_INSTALL_PREFIX={root}/installed")
    run(
        tool("cmake"),
        "-G",
        "Ninja",
        "-S",
        ROOT / "runtime",
        "-B",
        root / "build",
        *configure,
        "-DCMAKE_INSTALL_LIBDIR=lib",
    )
    run("cmake", "--build", root / "build")
    run("cmake", "--install", root / "build")
    (root / "installed").rename(root / "moved")
    shutil.rmtree(root / "build")
    lib = root / "moved/lib"
    return Installation(lib / "liblococo.so", str(lib / "cmake/lococo"), str(lib / "pkgconfig"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel in a fresh environment; nothing is downloaded."""
    root = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = (
        "-C",
        "cmake.build-type=None",
        "-C",
        f"cmake.define.CMAKE_CXX_FLAGS={QUICK}",
        "-C",
        f"build-dir={root}/b",
    )
    run(*pip, "wheel", ROOT, "--no-build-isolation", "--no-deps", "--no-index", "-w", root, *options)
    venv.create(root / "venv", symlinks=True)
    python = root / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", *root.glob("*.whl"))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).strip())
    for package in (Path(np.__file__).parent, Path(np.__file__).parent.with_name("numpy.libs")):
        if package.exists():
            (site / package.name).symlink_to(package)

    def ask(option: str) -> str:
        return run(python, "-m", "lococo_runtime", option, cwd=root).strip()

    assert ask("--version") == importlib.metadata.version("lococo-export")
    assert ask("--includes") == f"-I{site}/lococo_runtime/include"
    return Installation(site / "lococo_runtime/lib/liblococo.so", ask("--cmakedir"), ask("--pkgconfigdir"))


def with_cmake(installation: Installation, compilers: tuple[str, str], target: Path) -> None:
    run(
        *(tool("cmake"), "-G", "Ninja", "-S", EXAMPLES, "-B", target, f"-Dlococo_DIR={installation.cmake_dir}"),
        *(f"-DCMAKE_C_COMPILER={compilers[0]}", f"-DCMAKE_CXX_COMPILER={compilers[1]}"),
        *("-DCMAKE_C_FLAGS=-Werror", "-DCMAKE_CXX_FLAGS=-Werror"),
    )
    run("cmake", "--build", target)


def with_pkg_config(installation: Installation, compilers: tuple[str, str], target: Path) -> None:
    target.mkdir()
    flags = run(
        tool("pkg-config", "pkgconf"), "--cflags", "--libs", "lococo", PKG_CONFIG_PATH=installation.pkgconfig_dir
    ).split()
    for source in (*EXAMPLES.glob("*.c"), *EXAMPLES.glob("*.cc")):
        plus = source.suffix == ".cc"
        standard = "-std=c++11" if plus else "-std=c11"
        name = target / source.name.replace(".", "_")
        run(compilers[plus], standard, *STRICT, source, *flags, "-pthread", "-o", name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    make_model(root / "model")
    export_bundle(load_checkpoint(root / "model", policy="h2o", mem_size=24, block_size=16), root / "bundle")
    return root / "bundle"


def ids(line: str, word: str = "") -> list[int]:
    assert line.startswith(word)
    return [int(text) for text in line.removeprefix(word).split()]


@pytest.mark.parametrize(
    ("where", "build", "family"),
    [
        ("prefix", with_cmake, "gcc"),
        ("prefix", with_pkg_config, "clang"),
        ("wheel", with_cmake, "clang"),
        ("wheel", with_pkg_config, "gcc"),
    ],
)
def test_examples(
    request: pytest.FixtureRequest,
    where: str,
    build: Callable[[Installation, tuple[str, str], Path], None],
    family: str,
    bundle: Path,
    tmp_path: Path,
) -> None:
    """Every example, built as a user would, gives the tokens that the Python runtime gives."""
    installation: Installation = request.getfixturevalue(where)
    programs = tmp_path / "programs"
    build(installation, find_compilers(family), programs)
    environment = {"LOCOCO_ONNXRUNTIME": _c_api.find_onnxruntime() or ""}
    if build is with_pkg_config and where == "prefix":  # which the loader does not search; lococo.pc of a wheel says it
        environment["LD_LIBRARY_PATH"] = str(installation.library.parent)
    assert str(installation.library.parent) in run("ldd", programs / "generate_c", **environment)

    document, question = [*range(3, 60)], [9, 8, 7]
    with Model(bundle) as model:

        def greedy(session: Session, prompt: list[int], n: int) -> list[int]:
            return session.generate_all(prompt, SamplingParams(max_tokens=n))

        with model.session() as s:
            expected = greedy(s, [5, 6, 7], 40)
        out = run(programs / "generate_c", bundle, "40", "5", "6", "7", **environment).splitlines()
        assert ids(out[0], "tokens") == expected

        turns = "5 6 7\n\n8 9\n"
        with model.session() as s:
            replies = [greedy(s, [5, 6, 7], 30)]
            s.step(replies[0][-1])
            replies.append(greedy(s, [8, 9], 30))
        for name in ("chat_c", "chat_cc"):
            out = run(programs / name, bundle, "30", stdin=turns, **environment).splitlines()
            assert [ids(line) for line in out] == replies

        with model.session() as s:
            answer = greedy(s, document, 0) or greedy(s, question, 12)
        lines = f"{' '.join(map(str, document))}\n", f"{' '.join(map(str, question))}\n"
        packs = tmp_path / "c.lococo", tmp_path / "cc.lococo"
        run(programs / "memory_pack_c", "save", bundle, packs[0], stdin=lines[0], **environment)
        asked = run(programs / "memory_pack_c", "ask", bundle, packs[0], "12", stdin=lines[1] * 2, **environment)
        made = run(programs / "memory_pack_cc", bundle, packs[1], "12", stdin="".join(lines), **environment)
        again = run(programs / "memory_pack_cc", bundle, packs[1], "12", stdin=lines[1], **environment)
        assert [ids(line, "answer") for line in (asked + made + again).splitlines()] == [answer] * 4
        assert packs[0].read_bytes() == packs[1].read_bytes()

        both = []
        for prompt in (3, 4):
            with model.session() as s:
                both.append(greedy(s, [prompt], 40))
        for name in ("two_sessions_c", "two_sessions_cc"):
            out = run(programs / name, bundle, "40", "3", "4", **environment).splitlines()
            assert [ids(line, "tokens") for line in out] == both


def test_a_prefix_names_its_abi(prefix: Installation) -> None:
    versioned = prefix.library.with_name(f"liblococo.so.{numbers()['ABI_VERSION']}")
    assert versioned.resolve() == prefix.library.resolve()
    assert versioned.name.encode() in prefix.library.read_bytes()  # its SONAME


@pytest.mark.parametrize(("wanted", "found"), [("0.1", True), ("0.1.0", True), ("0.2", False), ("1.0", False)])
def test_find_package_asks_for_a_version(prefix: Installation, tmp_path: Path, wanted: str, found: bool) -> None:
    """Before 1.0 every minor version is another interface."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(p LANGUAGES NONE)\n"
        f"find_package(lococo {wanted} CONFIG)\nmessage(STATUS found=${{lococo_FOUND}})\n"
    )
    out = run(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "b", f"-Dlococo_DIR={prefix.cmake_dir}")
    assert f"found={int(found)}" in out
