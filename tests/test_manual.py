"""Every command and snippet of README.md and docs/ runs, from top to bottom of its page, on a tiny model.

A page has one directory, with a checkpoint, a bundle and texts under the names that the pages use, and one set of
Python names. A comment before a fence, which readers do not see, may say:

    <!-- file: NAME -->    the fence is this file
    <!-- test: REASON -->  it cannot run here: its commands and flags are checked, and it counts as skipped;
                           "needs a GPU": it runs in the part manual of scripts/gpu_host
                           "needs onnxruntime-gpu": there too, if its ONNX Runtime has the CUDA provider
                           "needs SmolLM2": it runs in the repository, where scripts/test has set it up
                           "needs peft": it runs where that is installed
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from bundles import CHATML
from commands import COMMANDS, ROOT, load_main, parser_of
from conftest import GPU_BUNDLES, has_cuda_provider
from lococo_runtime import LLM, Model, Session, _c_api
from lococo_runtime.bundle import LococoConfig
from tiny_models import make_model, random_heads
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lococo_export import export_bundle, load_checkpoint
from lococo_export.checkpoints import save_heads

markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py; install lococo-export[docs]")

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECONDS = 60  # for a server to start and to end; neither takes that long
GPU_REASONS = ("needs a GPU", "needs onnxruntime-gpu")
READ_ONLY = {"text", "{toctree}", "{eval-rst}", "{include}"}  # but for the first they are tested by building the pages

TOOLS = ("cc", "cmake", "curl", "pkg-config")  # that a fence may use, and that are not everywhere
OTHER_FLAGS = {"--lococo-update-baseline", "--onnxruntime"}  # of pytest, and of python -m lococo_runtime

# The tiny model on two cores is to be done in seconds. Of flags that are given twice the last ones count.
SMALLER = {
    "lococo-verify": "--prefill 64 --steps 20 --perplexity 0",
    "lococo-bench": "-p 16 -n 4 -r 1 --depth-by position",
    "lococo-fit": "--steps 2 --context 96 --batch 2 --mem-size 24 --local-len 8 --block-size 16 --bptt 1 --warmup 1"
    " --decode-blocks 0 --decode-fusions 1 --hh-keep-rate 0.5",
    "scripts/demo": "--tokens 2048 --max-tokens 8",
    "lococo-eval": "--contexts 64 96 --windows 1",
}


# --- what the pages say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fence:
    """A block of code of a page."""

    page: str  # from the repository's root
    line: int  # of its first line of code
    kind: str
    text: str
    file: str = ""
    reason: str = ""  # why it cannot run here

    @property
    def commands(self) -> list[str]:
        """The commands of a shell fence, without comments; a backslash joins lines."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s+)#\s.*", "", line).strip())]


def read_fences(page: Path) -> list[Fence]:
    name = page.relative_to(ROOT).as_posix()
    fences, notes = [], {}
    for token in markdown_it.MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            notes.update(re.findall(r"<!-- (file|test): (.+?) -->", token.content))
            continue
        if token.type in ("fence", "code_block"):
            kind = token.info.split()[0] if token.info else token.type
            fences.append(
                Fence(
                    name,
                    token.map[0] + 1 + (token.type == "fence"),
                    kind,
                    token.content,
                    notes.get("file", ""),
                    notes.get("test", ""),
                )
            )
        notes = {}
    return fences


FENCES = {page.relative_to(ROOT).as_posix(): read_fences(page) for page in PAGES}


# --- what they are run with ------------------------------------------------------------------------------------------


def make_tokenizer(corpus: list[Path]) -> Tokenizer:
    """Byte-level BPE with the special tokens of SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in corpus], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume to be there."""
    root = tmp_path_factory.mktemp("world")
    plain, fitted = root / "SmolLM2-135M-Instruct", root / "ckpt"
    make_model(plain, vocab_size=4096)
    make_tokenizer([*PAGES, *(ROOT / "runtime" / "lococo_runtime").glob("*.py")]).save(str(plain / "tokenizer.json"))
    (plain / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    shutil.copytree(plain, fitted)
    cache = LococoConfig(mem_size=32, keep=16, block_size=32, local_len=8, kernel_size=5)
    save_heads(fitted, cache, random_heads(load_checkpoint(plain, policy="h2o").geometry, cache))
    export_bundle(load_checkpoint(fitted), root / "bundle", batch=8)

    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (root / "texts").mkdir()
    for i in range(3):
        (root / "texts" / f"{i}.txt").write_text(f"{i}. {text[4000 * i : 4000 * i + 4000]}")
    for name in ("book.txt", "manual.txt"):
        (root / name).write_text(text[:2000])
    for name in ("examples", "scripts", "runtime"):
        (root / name).symlink_to(ROOT / name)
    shims = root / ".bin"  # the commands, installed or not
    shims.mkdir()
    for name, target in {**COMMANDS, "pytest": "pytest:console_main"}.items():
        module, _, function = target.partition(":")
        (shims / name).write_text(
            f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        (shims / name).chmod(0o755)
    if builder := os.environ.get("LOCOCO_BUILD_COMMAND"):  # TensorRT may live in another Python
        (shims / "lococo-build").unlink()
        (shims / "lococo-build").symlink_to(builder)
    return root


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@dataclass
class Page:
    """A page in its directory."""

    fences: list[Fence]
    folder: Path
    world: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    next: int = 0
    lacks: str = ""  # a tool without which the rest of the page has no ground
    server: subprocess.Popen[str] | None = None
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        made = re.findall(r"(?:-o|--output) (\w+)", "".join(f.text for f in self.fences))  # on the page itself
        for path in self.world.iterdir():
            if path.name not in made:
                (self.folder / path.name).symlink_to(path)

    @property
    def environment(self) -> dict[str, str]:
        plugin = any(e.name == "lococo_bench" for e in importlib.metadata.entry_points(group="pytest11"))
        path = [str(self.world / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "HOME": str(self.folder),
            "PYTEST_ADDOPTS": "" if plugin else "-p lococo_bench.pytest_plugin",
        }

    def run_to(self, index: int) -> None:
        """Runs what has not been run yet, up to a fence."""
        while self.next <= index:
            fence = self.fences[self.next]
            self.next += 1
            if reason := self.lacks or why_not(fence):
                self.lacks = reason if reason.removeprefix("needs ") in TOOLS else ""
            else:
                RUN[fence.kind](self, fence)

    def write(self, fence: Fence) -> bool:
        """Writes a fence that is a file."""
        if fence.file:
            (self.folder / fence.file).write_text(fence.text, encoding="utf-8")
        return bool(fence.file)

    def run_python(self, fence: Fence) -> None:
        if not self.write(fence):
            source = "\n" * (fence.line - 1) + self.here(fence.text)
            exec(compile(source, fence.page, "exec"), self.names)

    def run_shell(self, fence: Fence) -> None:
        check_commands(fence)
        script = []
        for command in fence.commands:
            words = shlex.split(command)
            smaller = SMALLER.get(words[0], "")
            if "--baseline" in words:  # timing is not for tests
                smaller += " --fail-above 1000"
            if words[:2] == ["pip", "install"]:
                continue  # checked; tests/test_install.py and tests/test_c_package.py install
            if "lococo-serve" in words:
                self.serve(words)
            elif words[0] in COMMANDS and not (script or fence.reason or re.search(r"[|&;<>$`]", command)):
                # in this process, as most of a command's time is the import of PyTorch
                with mock.patch("sys.stdin", io.StringIO("Who is it about?\n")):
                    assert call(partial(load_main(words[0]), [*words[1:], *smaller.split()])) == 0, command
            else:
                script.append(f"{self.here(command)} {smaller}")
        if script:
            result = subprocess.run(
                ["bash", "-ec", "\n".join(script)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                cwd=ROOT if fence.reason == "needs SmolLM2" else None,
                check=False,
            )
            assert result.returncode == 0, "\n".join(script)

    def serve(self, words: list[str]) -> None:
        """Starts a server that runs until the next one, or to the end of the page."""
        self.stop_serving()
        at = words.index("lococo-serve")
        command = [sys.executable, "-m", "lococo_server", *words[at + 1 :], "--port", str(self.port)]
        environment = {**self.environment, **dict(w.split("=", 1) for w in words[:at])}
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.server.stderr is not None
        lines = []
        for line in self.server.stderr:
            lines.append(line)
            if "running on http://" in line:
                return
        raise AssertionError("".join(lines))

    def stop_serving(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            _, errors = self.server.communicate(timeout=SECONDS)
            assert self.server.returncode == 0, errors
            self.server = None

    def here(self, text: str) -> str:
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")

    def close(self) -> None:
        for value in self.names.values():
            if isinstance(value, LLM | Model | Session):
                value.close()
        self.stop_serving()


def call(main: Callable[[], Any]) -> Any:
    """What it returns, or exits with; --help exits with 0."""
    try:
        return main()
    except SystemExit as e:
        return e.code


def parse(read: Callable[[str], Any]) -> Callable[[Page, Fence], None]:
    def run(page: Page, fence: Fence) -> None:
        read(fence.text)
        page.write(fence)

    return run


def read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def read_yaml(text: str) -> Any:
    import yaml  # comes with myst-parser

    return yaml.safe_load(text)


RUN: dict[str, Callable[[Page, Fence], Any]] = {
    "python": Page.run_python,
    "bash": Page.run_shell,
    "c": Page.write,  # compiled by a command of the page
    "cmake": Page.write,
    "json": parse(json.loads),
    "toml": parse(read_toml),
    "yaml": parse(read_yaml),
    **dict.fromkeys(READ_ONLY, lambda page, fence: None),
}


# --- what is checked where it cannot run -----------------------------------------------------------------------------


def check_commands(fence: Fence) -> None:
    """Every program and script is there, and has the flags."""
    for command in fence.commands:
        while command != (command := re.sub(r"\$\([^()]*\)", "OUTPUT", command)):
            pass  # what a command writes is one word
        lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        simple: list[list[str]] = [[]]
        for word in lexer:
            if set(word) <= set("|&;"):
                simple.append([])
            elif simple[-1] or not re.match(r"\w+=", word):  # not of the environment
                simple[-1].append(word)
        for words in filter(None, simple):
            check_command(words, f"{fence.page}:{fence.line}: {command}")


def check_command(words: list[str], where: str) -> None:
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    if program == "torchrun":
        program, arguments = "lococo-fit", arguments[arguments.index("lococo-fit)") + 1 :]
    if program in COMMANDS:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            wrong = call(lambda: parser_of(program).parse_args(arguments) and 0)
        assert wrong == 0, f"{where}\n{output.getvalue()}"
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extras in re.findall(r"lococo-export\[(.+?)\]", " ".join(arguments)):
            assert [e for e in extras.split(",") if f"\n{e} = [" not in project] == [], where
    else:
        if program == "python" and arguments[0].endswith(".py"):
            program, arguments = arguments[0], arguments[1:]
        if "scripts/" in program:
            source = (ROOT / program).read_text(encoding="utf-8")
            flags = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
            assert [flag for flag in flags if f'"{flag}"' not in source] == [], where
        else:
            known = (*TOOLS, "cd", "export", "polygraphy", "pytest", "source")
            assert "/" in program or shutil.which(program) or program in known, where


def why_not(fence: Fence) -> str:
    """Why a fence cannot run on this machine, "" if it can."""
    if fence.kind == "bash":
        for tool in TOOLS:
            if re.search(rf"(?<![\w-]){tool} ", fence.text) and not shutil.which(tool):
                return f"needs {tool}"
    if fence.reason in GPU_REASONS and GPU_BUNDLES:
        return "" if fence.reason == "needs a GPU" or has_cuda_provider() else fence.reason
    if fence.reason == "needs peft" and importlib.util.find_spec("peft"):
        return ""
    if fence.reason == "needs SmolLM2":
        wanted = (".cache/models/SmolLM2-135M-Instruct", ".cache/texts/persuasion.txt", ".venv/lococo-installed")
        return "" if all((ROOT / path).exists() for path in wanted) else "needs SmolLM2 and the text: run scripts/demo"
    return fence.reason


# --- the tests -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Any]:
    for name, fences in FENCES.items():
        for i, fence in enumerate(fences):
            if fence.kind not in READ_ONLY:
                marks = {"needs SmolLM2": [pytest.mark.smollm2], **{r: [pytest.mark.gpu] for r in GPU_REASONS}}
                yield pytest.param(name, i, marks=marks.get(fence.reason, []), id=f"{name}:{fence.line}-{fence.kind}")


@pytest.fixture(scope="module")
def pages(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Page]]:
    opened = {name: Page(fences, tmp_path_factory.mktemp("page"), world) for name, fences in FENCES.items() if fences}
    yield opened
    for page in opened.values():
        page.close()


@pytest.mark.parametrize(("name", "index"), list(cases()))
def test_snippet(name: str, index: int, pages: dict[str, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    page, fence = pages[name], FENCES[name][index]
    assert fence.kind in RUN, f"{name}:{fence.line}: expected a fence of {', '.join(RUN)}, got {fence.kind}"
    if fence.reason:
        ast.parse(fence.text) if fence.kind == "python" else check_commands(fence)
    monkeypatch.chdir(page.folder)
    monkeypatch.setenv("LOCOCO_ONNXRUNTIME", os.environ.get("LOCOCO_ONNXRUNTIME") or _c_api.find_onnxruntime() or "")
    page.run_to(index)
    if reason := page.lacks or why_not(fence):
        pytest.skip(reason)


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *(ROOT / "examples").rglob("*.md"), *(ROOT / "heads").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_flags_in_the_text_exist() -> None:
    """A sentence names flags as `lococo-run --chat`, or alone, as `--chat`."""
    flags = {name: {f for a in parser_of(name)._actions for f in a.option_strings} for name in COMMANDS}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py"))
    known = set().union(*flags.values(), OTHER_FLAGS, re.findall(r'add(?:_argument)?\("(--[\w-]+)"', scripts))
    for page in PAGES:
        for token in markdown_it.MarkdownIt().parse(page.read_text(encoding="utf-8")):
            for span in (child.content for child in token.children or () if child.type == "code_inline"):
                program = span.split()[0]
                if program in COMMANDS or program.startswith("--"):
                    said = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", span))
                    assert said <= flags.get(program, known), f"{page}: {span}"


def test_figures_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    subprocess.run([sys.executable, ROOT / "scripts" / "plot_measured.py", tmp_path], check=True)
    for name in ("cpu.svg", "quality.svg"):
        assert "<svg" in (tmp_path / name).read_text(encoding="utf-8")


def test_fences_are_found(tmp_path: Path) -> None:
    """In lists and by any marks, with their notes; also blocks that no test would know what to do with."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: a.c -->\n```c\nint x;\n```\n\n1. a step\n\n   <!-- test: needs a GPU -->\n   ~~~bash\n   ls"
        "\n   ~~~\n\n<!-- test: far away -->\ntext\n\n    indented\n\n```\nwithout a kind\n```\n"
    )
    with mock.patch(f"{__name__}.ROOT", tmp_path):
        found = [(f.line, f.kind, f.file, f.reason) for f in read_fences(page)]
    assert found == [
        (3, "c", "a.c", ""),
        (10, "bash", "", "needs a GPU"),
        (16, "code_block", "", ""),
        (19, "fence", "", ""),
    ]
    assert not {"code_block", "fence"} & RUN.keys()


def test_no_command_hides_in_plain_text() -> None:
    for name, fences in FENCES.items():
        for fence in fences:
            if fence.kind == "text":
                assert not re.findall(r"^(?:\$ |lococo-|pip |python )", fence.text, re.MULTILINE), (
                    f"{name}:{fence.line}"
                )


def test_comments_say_what_fences_are() -> None:
    """No comment of this kind goes unread."""
    for page in PAGES:
        said = len(re.findall(r"^ *<!-- (?:file|test): ", page.read_text(encoding="utf-8"), re.MULTILINE))
        fences = FENCES[page.relative_to(ROOT).as_posix()]
        assert said == sum(bool(f.file) + bool(f.reason) for f in fences), page


def test_a_wrong_flag_is_found() -> None:
    def fence(text: str) -> Fence:
        return Fence("page", 1, "bash", text)

    check_commands(fence("LOCOCO_API_KEY=x lococo-serve bundle/ &\nlococo-run bundle --file a.txt  # --nonsense"))
    for wrong in ("lococo-run bundle --nonsense", "true && lococo-serve", "scripts/demo.py --nonsense", "no-program x"):
        with pytest.raises(AssertionError):
            check_commands(fence(wrong))
    with pytest.raises(AssertionError):
        check_commands(fence("pip install 'lococo-export[cpu,nonsense]'"))
