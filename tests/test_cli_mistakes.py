"""What a person gets wrong on a command line: one line that names it, before anything is measured, read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from bundles import byte_tokenizer, export_text
from commands import COMMANDS, load_main
from lococo_runtime import _commands
from tiny_models import make_model

MISTAKES = {
    "lococo-run text.txt --prompt x": "text.txt: expected a bundle directory as written by lococo-export, got a file",
    "lococo-run bundle/lococo.json --prompt x": "bundle/lococo.json: expected a bundle directory",
    "lococo-run folder --prompt x": "folder/lococo.json: not found",
    "lococo-run bundle --file empty.txt": "empty.txt: expected some text, got an empty file",
    "lococo-run bundle --file folder": "folder: cannot be read",
    "lococo-run bundle --file bytes.bin": "bytes.bin: expected UTF-8 text",
    "lococo-run bundle --prompt x --load-state text.txt": "this is no saved state",
    "lococo-run bundle --prompt x --load-state folder": "folder: expected a regular file",
    "lococo-run bundle --prompt x --save-state nowhere/state": "nowhere/state: cannot write",
    "lococo-run bundle --prompt x --threads -1": "num_threads: expected 0",
    "lococo-inspect text.txt": "text.txt: expected a bundle directory",
    "lococo-export --model text.txt -o out": "text.txt: expected a model directory",
    "lococo-export --model model --policy h2o --mem-size 0 -o out": "mem_size: expected at least 1",
    "lococo-export --model model --policy h2o --mem-size 24 -o text.txt": "text.txt: already exists",
    "lococo-export --model model --policy h2o --mem-size 24 --force -o model": "refusing to replace it",
    "lococo-verify bundle --model model --prefill 0": "--prefill: expected at least 1, got 0",
    "lococo-verify bundle --model model --steps -1": "--steps: expected at least 0, got -1",
    "lococo-verify bundle --model model --perplexity -1": "--perplexity: expected at least 0, got -1",
    "lococo-verify bundle --model model --seed -1": "--seed: expected at least 0, got -1",
    "lococo-verify bundle --model model --atol nan": "--atol: expected at least 0, got nan",
    "lococo-verify bundle --model model --text bytes.bin": "bytes.bin: expected UTF-8 text",
    "lococo-build text.txt": "text.txt: expected a bundle directory",
    "lococo-build bundle --recipe nonsense": "nonsense",
    "lococo-build bundle --recipe nowhere.toml": "nowhere.toml",
    "lococo-build bundle --mem-pool-size 2G": "mem_pool_size: expected workspace:N",
    "lococo-bench bundle -p 0 -n 0": "nothing to measure: expected -p or -n above 0",
    "lococo-bench bundle -t -1": "num_threads: expected 0 or more, got -1",
    "lococo-bench bundle --fail-above 0.5": "--fail-above: expected at least 1, got 0.5",
    "lococo-bench bundle --fail-above nan": "--fail-above: expected at least 1, got nan",
    "lococo-bench bundle --fail-above 1.2": "--fail-above: expected --baseline too, got --fail-above alone",
    "lococo-bench bundle --model model": "--model: expected --against too",
    "lococo-bench bundle --against-max-depth 5": "--against-max-depth: expected --against too",
    "lococo-bench bundle --against= --model model": "--against: expected torch, or some of transformers-dynamic",
    "lococo-bench bundle --plot x.docx": "--plot: expected a name that ends in one of",
    "lococo-bench bundle --plot x.svg -n 0": "--plot: draws generation; expected -n above 0",
    "lococo-bench bundle --baseline bytes.bin": "bytes.bin: expected rows of lococo-bench",
    "lococo-bench bundle --baseline folder": "folder",
    "lococo-bench bundle --plot nowhere/x.svg": "nowhere/x.svg: cannot write",
    "lococo-bench bundle --plot folder": "folder: cannot write",
    "lococo-serve text.txt": "text.txt: expected a bundle directory",
    "lococo-serve bundle --host=": "--host: expected an address",
    "lococo-serve bundle --drain-timeout -4": "--drain-timeout: expected at least 0, got -4",
    "lococo-serve bundle --sessions 0": "sessions: expected at least 1",
    "lococo-serve bundle --state-dir text.txt": "text.txt: cannot make",
    "lococo-fit --model nowhere --text text.txt -o out": "nowhere: expected a model directory",
    "lococo-fit --model model --text nowhere.txt -o out": "nowhere.txt: not found",
    "lococo-fit --model model --text text.txt -o out --config folder": "folder",
    "lococo-eval --model model": "expected --text for perplexity",
    "lococo-eval --model model --text text.txt --windows 0": "--windows: expected at least 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    export_text(root / "bundle")
    make_model(root / "model", vocab_size=260, eos_token_id=257, bos_token_id=None)
    byte_tokenizer("<|im_start|>", "<|im_end|>").save(str(root / "model/tokenizer.json"))
    (root / "folder").mkdir()
    (root / "text.txt").write_text("Call me Ishmael. " * 20)
    (root / "empty.txt").touch()
    (root / "bytes.bin").write_bytes(bytes(range(128, 256)))
    return root


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    command, *arguments = line.split()
    assert load_main(command)(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert MISTAKES[line] in said.err
    assert said.out == ""
    assert sorted(folder.iterdir()) == before


def test_every_command_is_mistaken() -> None:
    assert {line.split()[0] for line in MISTAKES} == set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("lococo-export", "onnx", "export"), ("lococo-verify", "torch", "export"), ("lococo-build", "onnx", "tensorrt"),
     ("lococo-fit", "safetensors", "fit"), ("lococo-eval", "torch", "fit"), ("lococo-serve", "fastapi", "serve"),
     ("lococo-serve", "uvicorn", "serve"), ("lococo-run", "tokenizers", "text")],
)  # fmt: skip
def test_a_missing_extra_is_named(command: str, package: str, extra: str, folder: Path) -> None:
    module, _, main = COMMANDS[command].partition(":")
    script = f"""
import sys
sys.modules[{package!r}] = None
from {module} import {main} as main
sys.exit(main(["bundle", "--prompt", "x"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert f"lococo-export[{extra}]" in done.stderr
    assert package in done.stderr


def test_ctrl_c_while_a_command_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("importlib.import_module", side_effect=KeyboardInterrupt):
        assert _commands.export_main(["--help"]) == 130
    assert capsys.readouterr() == ("", "")


SCRIPT = "import sys; from lococo_runtime.cli import {main}; sys.exit({main}(sys.argv[1:]))"


def shell(line: str, main: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of lococo_runtime.cli as "$@" in a line of shell."""
    command = ["bash", "-c", line, "bash", sys.executable, "-c", SCRIPT.format(main=main), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, cwd=cwd, env=environment, timeout=300
    )


def test_streams_that_are_closed(folder: Path) -> None:
    """As a daemon has them: what cannot be read is empty, what cannot be written is dropped."""
    run = ("bundle", "--prompt", "hi", "--max-tokens", "2")
    for line in ('"$@" <&-', '"$@" >&-', '"$@" 2>&-', '"$@" <&- >&- 2>&-'):
        for extra in ((), ("--chat",)):
            done = shell(line, "run_main", *run, *extra, cwd=folder)
            assert done.returncode == 0, (line, done.stderr)
            assert "Traceback" not in done.stderr
    both = shell('"$@" 2>&-', "run_main", *run, cwd=folder)
    assert "position" not in both.stdout


def test_an_encoding_that_lacks_the_text(folder: Path) -> None:
    flags = ("bundle", "--prompt", "x", "--regex", "é漢", "--max-tokens", "9")
    done = shell('"$@"', "run_main", *flags, cwd=folder, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\xe9\\u6f22\n")
    assert shell('"$@"', "run_main", *flags, cwd=folder, PYTHONIOENCODING="utf-8").stdout == "é漢\n"


def test_no_space_for_output(folder: Path) -> None:
    for main, arguments in (("inspect_main", ()), ("run_main", ("--prompt", "hi", "--max-tokens", "2"))):
        done = shell('"$@" > /dev/full', main, "bundle", *arguments, cwd=folder)
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
