"""The examples, run as their READMEs say, against a random model: what they print is nonsense, how they work is not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Backend
from lococo_runtime import LLM
from test_bench import changed, plugin_options
from test_server import serving

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 300  # for anything to happen; nothing here takes that long


def load(path: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(path: str, *arguments: str | Path, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """An example as a user runs it."""
    command = [sys.executable, str(EXAMPLES / path), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=cwd, timeout=SECONDS)


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    return cpu.bundle("text")


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[LLM]:
    with LLM(bundle) as opened:
        yield opened


def test_every_example_has_a_readme_and_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w+)/", (EXAMPLES / "README.md").read_text()))
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert listed == folders
    assert all((EXAMPLES / name / "README.md").is_file() for name in folders - {"c"})


# --- robot -----------------------------------------------------------------------------------------------------------


def test_a_question_leaves_no_trace(llm: LLM, tmp_path: Path) -> None:
    robot = load("robot/robot.py")
    asked, silent = robot.Memory(llm, tmp_path / "asked"), robot.Memory(llm, tmp_path / "silent")
    for i in range(20):
        for memory in (asked, silent):
            memory.sense(f"line {i}")
        assert isinstance(asked.ask("Where are you?"), str)
    assert asked.session.state() == silent.session.state()
    asked.session.close()
    silent.session.close()


def test_a_robot_goes_on_after_a_power_cut(llm: LLM, tmp_path: Path) -> None:
    robot = load("robot/robot.py")
    path = tmp_path / "state"
    memory = robot.Memory(llm, path)
    sizes = set()
    for i in range(30):
        memory.sense(f"line {i}")
        if i % 10 == 9:
            memory.save()
            sizes.add(path.stat().st_size)
    assert len(sizes) == 1
    again = robot.Memory(llm, path)
    assert again.session.position == len("The robot's log:\n") + sum(len(f"line {i}\n") for i in range(30))
    assert again.ask("Where?") == memory.ask("Where?")
    again.session.close()
    memory.session.close()


def test_robot(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "day.log").write_text("08:00 The robot is in the hall.\n" * 50)
    arguments = (bundle, "--sensors", "day.log", "--state", "robot.lococo", "--save-every", "0")
    for times in (1, 2):
        done = run("robot/robot.py", *arguments, cwd=tmp_path, stdin="Where are you?\n\nWhy?\n")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n> ") == 2
        reports = re.findall(
            r"^position ([\d,]+), (\d+) slots, state ([\d,]+) bytes, memory \d+ MiB$", done.stderr, re.M
        )
        assert reports[-1][0] == f"{17 + times * 50 * 32:,}"
        assert len({state for _, _, state in reports}) == 1
        assert max(int(slots) for _, slots, _ in reports) <= 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_robot_that_is_ended_saves(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(EXAMPLES / "robot/robot.py"), str(bundle), "--interval", "0.01", "--save-every", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(number)
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 0
    with LLM(bundle) as llm, llm.model.session() as session:
        session.load(tmp_path / "robot.lococo")
        assert last.startswith(f"position {session.position:,},")


# --- document assistant ----------------------------------------------------------------------------------------------


def test_a_document_is_read_once(bundle: Path, llm: LLM, tmp_path: Path) -> None:
    kettle = EXAMPLES / "document_assistant/kettle.txt"
    questions = ("How long is the guarantee?", "What does a red light mean?")
    first = run("document_assistant/ask.py", bundle, kettle, *questions, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "reading" in first.stderr
    (pack,) = (tmp_path / "packs").iterdir()
    assert pack.stat().st_size == llm.model.state_bytes + 88
    again = run("document_assistant/ask.py", bundle, kettle, cwd=tmp_path, stdin="\n".join(questions))
    assert again.stdout == first.stdout
    assert "reading" not in again.stderr
    ask = load("document_assistant/ask.py")
    with ask.read_once(llm, kettle, tmp_path / "packs") as document:
        before = document.state()
        answers = ["".join(ask.ask(llm, document, question)) for question in questions]
        assert document.state() == before
    assert first.stdout == "".join(f"{q}\n>{a}\n" for q, a in zip(questions, answers, strict=True))

    (tmp_path / "other.txt").write_text("Another document.")
    other = run("document_assistant/ask.py", bundle, "other.txt", "Why?", cwd=tmp_path)
    assert "reading" in other.stderr
    assert len(list((tmp_path / "packs").iterdir())) == 2


# --- agent -----------------------------------------------------------------------------------------------------------


def test_agent(bundle: Path, tmp_path: Path) -> None:
    """The first step is a tool; every step is valid; the loop ends with or without an answer; the server ends."""
    done = run("agent/agent.py", bundle, "What is 17 times 23?", cwd=tmp_path)
    steps = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert 1 <= len(steps) <= 5
    assert steps[0]["tool"] in ("calculator", "search")
    assert done.returncode == (0 if steps[-1]["tool"] == "answer" else 1)
    assert "Traceback" not in done.stderr
    assert "Finished server process" in done.stderr


def test_agent_says_that_the_server_did_not_start(tmp_path: Path) -> None:
    done = run("agent/agent.py", tmp_path / "nowhere", "Why?", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "did not start" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conversation_of_an_agent(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that asks, looks up and answers, in the place of the random one; the rest is real."""
    agent = load("agent/agent.py")
    (tmp_path / "a.txt").write_text("The kettle holds 1.7 litres.\n")
    script = iter([("search", "kettle"), ("calculator", "1.7 * 2"), ("calculator", "2 ** 9"), ("answer", "3.4")])
    requests: list[list[dict[str, str]]] = []
    with serving(bundle) as server, server.client() as client:
        create = client.chat.completions.create

        def scripted(**request: Any) -> Any:
            requests.append(list(request["messages"]))
            reply = create(**request)
            tool, text = next(script)
            reply.choices[0].message.content = json.dumps({"tool": tool, "input": text})
            return reply

        monkeypatch.setattr(client.chat.completions, "create", scripted)
        assert agent.run(client, "How much do two kettles hold?", tmp_path) == "3.4"
    said = [message["content"] for message in requests[-1]]
    assert "search: The kettle holds 1.7 litres." in said
    assert "calculator: 3.4" in said
    assert said[-1].startswith("calculator: error: expected numbers")


@pytest.mark.parametrize(
    ("expression", "result"),
    [("12 * (3 + 4)", "84"), ("-1 / 4", "-0.25"), ("1 / 0", "error"), ("2 ** 99", "error"), ("f()", "error"),
     ("", "error"), ("1, 2", "error"), ("'a' * 9", "error"), ("(" * 500, "error"), ("01", "error"), ("\0", "error")],
)  # fmt: skip
def test_calculator(expression: str, result: str) -> None:
    assert load("agent/agent.py").calculate(expression).startswith(result)


# --- latency regression ----------------------------------------------------------------------------------------------


def test_latency_project(bundle: Path, tmp_path: Path) -> None:
    """The project as it is, in its own folder: a baseline recorded, a better one, another machine's."""
    project = tmp_path / "project"
    shutil.copytree(EXAMPLES / "latency_regression", project, ignore=shutil.ignore_patterns("latency.json"))
    workflow = (project / ".github/workflows/latency.yml").read_text()
    (command,) = re.findall(r"- run: (pytest.*)", workflow)
    file = project / "tests/latency.json"

    def check(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command.split(), *plugin_options(), "-p", "no:cacheprovider", *options],
            capture_output=True, text=True, check=False, cwd=project, timeout=SECONDS,
            env={**os.environ, "READER_BUNDLE": str(bundle), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    assert check("--lococo-update-baseline").returncode == 0
    rows = json.loads(file.read_text())
    assert {row["n_depth"] for row in rows} == {0, 1 << 20}
    file.write_text(json.dumps(changed(rows, samples_ns=[1])))
    slower = check()
    assert slower.returncode == 1
    assert re.search(r"tg32 @ d1048576 .*above 1\.1", slower.stdout)
    file.write_text(json.dumps(changed(rows, cpu_info="another")))
    skipped = check()
    assert skipped.returncode == 0
    assert "other hardware" in skipped.stdout
