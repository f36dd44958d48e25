"""The commands, as a person types them."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bundles import byte_tokenizer
from conftest import Backend, has_driver
from lococo_runtime import LLM, Chat, EmptyPromptError, NotFoundError, SamplingParams, Session
from lococo_runtime.cli import inspect_main, run_main
from lococo_runtime.llm import stream_text
from tiny_models import edit_tensors, make_model

from lococo_export.cli import export_main, verify_main

FLAGS = ["--policy", "h2o", "--mem-size", "24", "--block-size", "16"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_model(path, vocab_size=256)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "bundle"
    assert export_main(["--model", str(checkpoint), "-o", str(target), *FLAGS]) == 0
    return target


@pytest.mark.parametrize("main", [export_main, verify_main, run_main, inspect_main])
def test_help_fits_one_screen(
    main: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])  # type: ignore[operator]
    assert len(capsys.readouterr().out.splitlines()) <= (24 if main is export_main else 32)


def test_export_says_what_it_made(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bundle"
    assert export_main(["--model", str(checkpoint), "-o", str(target), "--fp16", *FLAGS]) == 0
    assert re.search(r"h2o, 24 slots, fp16, state [\d,]+ bytes", capsys.readouterr().out)
    assert export_main(["--model", str(checkpoint), "-o", str(target), *FLAGS]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here")
def test_export_says_what_to_run_on_the_target(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bundle"
    export = ["--model", str(checkpoint), "-o", str(target), "--fp16", "--force", *FLAGS]
    assert export_main(export) == 0
    error = capsys.readouterr().err
    assert "note: no TensorRT engines were built: no NVIDIA driver on this machine" in error
    assert f"run there:\n  lococo-build {target}\n" in error
    assert "Then run here" not in error

    # a GPU without TensorRT
    from lococo_engines.gpu import Device

    monkeypatch.setattr("lococo_engines.build.query_device", lambda: Device(0, "NVIDIA H100", 90, "13.0", 2**36))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert export_main(export) == 0
    error = capsys.readouterr().err
    assert "building TensorRT engines here, for NVIDIA H100 (sm90" in error
    assert "pip install tensorrt 'lococo-export[tensorrt]'" in error
    assert error.endswith(f"\nThen run here: lococo-build {target}\n")

    # both: the engines' directory is the last line
    def build(bundle: Path, *_: object, **__: object) -> Path:
        return bundle / "engines" / "trt-8.6.0-sm90"

    monkeypatch.setattr("lococo_engines.build_engines", build)
    assert export_main(export) == 0
    done = capsys.readouterr()
    assert "building TensorRT engines here" in done.err
    assert done.out.splitlines()[-1] == f"{target}/engines/trt-8.6.0-sm90"
    assert export_main([*export, "--no-engines"]) == 0
    assert "engines" not in "".join(capsys.readouterr())


def test_export_without_policy_says_what_to_do(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_main(["--model", str(checkpoint), "-o", str(tmp_path / "b")]) == 1
    assert "--policy h2o" in capsys.readouterr().err


def test_inspect_is_readable(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(bundle)]) == 0
    out = capsys.readouterr().out
    for expected in ("llama", "h2o", "24 after a fusion", "bytes a session", "decoder_1.onnx"):
        assert expected in out
    assert inspect_main([str(bundle / "nowhere")]) == 1


def test_run_continues_a_prompt_and_a_file(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 20)
    state = str(tmp_path / "state")
    common = [str(backend.bundle("text")), *backend.flags, "--max-tokens", "8"]
    assert run_main([*common, "--file", str(tmp_path / "book.txt"), "--prompt", "?", "--save-state", state]) == 0
    first = capsys.readouterr()
    assert "read 341 tokens" in first.err
    assert run_main([*common, "--load-state", state]) == 0
    assert capsys.readouterr().out == first.out
    assert run_main(common) == 1
    assert "--prompt" in capsys.readouterr().err
    assert run_main([*common, "--file", str(tmp_path / "missing.txt")]) == 1
    assert run_main([*common, "--file", str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert run_main([str(tmp_path / "nowhere"), "--prompt", "x"]) == 1
    assert "expected a bundle directory" in capsys.readouterr().err


def test_run_makes_a_memory_pack_and_goes_on_from_it(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A document read once answers as one that is read every time."""
    book, pack = str(tmp_path / "book.txt"), str(tmp_path / "book.lococo")
    bundle = [str(backend.bundle("text")), *backend.flags]
    once = [*bundle, "--max-tokens", "8"]
    (tmp_path / "book.txt").write_text(
        "Call me Ishmael " * 20
    )  # whole blocks: the question begins a forward of its own
    assert run_main([*bundle, "--file", book, "--save-state", pack, "--max-tokens", "0"]) == 0
    assert capsys.readouterr().out.strip() == ""
    answers = []
    for question in ("Who speaks?", "Why?"):
        assert run_main([*once, "--load-state", pack, "--prompt", question]) == 0
        from_pack = capsys.readouterr()
        assert f"read {len(question)} tokens" in from_pack.err
        assert run_main([*once, "--file", book, "--prompt", question]) == 0
        read_again = capsys.readouterr()
        assert f"read {320 + len(question)} tokens" in read_again.err
        assert from_pack.out == read_again.out
        answers.append(from_pack.out)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("target", ["no/such/folder/state", "."])
def test_run_says_at_once_that_it_cannot_save(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    command = [str(bundle), "--prompt", "x" * 50, "--save-state", str(tmp_path / target)]
    assert run_main(command) == 1
    err = capsys.readouterr().err
    assert "cannot write" in err
    assert "read " not in err


def test_verify_agrees_and_names_what_does_not(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--prompt-tokens", "100", "--steps", "60"]
    assert verify_main([str(bundle), "--model", str(checkpoint), *short]) == 0
    assert "agrees" in capsys.readouterr().out

    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    edit_tensors(other, {"model.layers.1.self_attn.v_proj.weight": torch.zeros(16, 32)})
    assert verify_main([str(bundle), "--model", str(other), *short]) == 1
    out = capsys.readouterr().out
    assert "past_key_values.1.value" in out
    assert "forward 1 " in out

    edited = json.loads((checkpoint / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (other / "config.json").write_text(json.dumps(edited))
    assert verify_main([str(bundle), "--model", str(other), *short]) == 1
    assert "rms_norm_eps" in capsys.readouterr().err


def test_llm_and_session_say_the_same(bundle: Path) -> None:
    with LLM(bundle) as llm:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        out = llm.generate("Hello", params)
        assert (len(out.token_ids), out.finish_reason) == (12, "length")
        assert "".join(llm.generate_stream("Hello", params)) == out.text.rstrip("�")
        with Session(bundle) as session:
            ids = llm.tokenizer.encode("Hello").ids
            assert list(session.generate(ids, params)) == out.token_ids
        with pytest.raises(EmptyPromptError, match="empty"):
            llm.generate("")


def test_streaming_never_splits_a_character() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve 漢字 🙂!"
    pieces = list(stream_text(tokenizer, iter(tokenizer.encode(text).ids)))
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces)


def test_llm_needs_a_tokenizer(cpu: Backend) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        LLM(cpu.bundle("session"))


@pytest.fixture
def chat_command(backend: Backend) -> list[str]:
    return [str(backend.bundle("text")), *backend.flags, "--chat"]


def test_run_converses_and_keeps_the_state(
    backend: Backend,
    chat_command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    state = str(tmp_path / "state")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nMore\n"))
    flags = ["--max-tokens", "8", "--temperature", "1", "--top-k", "20"]
    assert run_main([*chat_command, "--system", "Be brief.", *flags, "--save-state", state]) == 0
    said = capsys.readouterr()
    with LLM(backend.bundle("text"), **backend.options) as llm, llm.model.session() as session:
        chat = Chat(llm, [{"role": "system", "content": "Be brief."}])
        params = SamplingParams(max_tokens=8, temperature=1, top_k=20)
        assert said.out == chat.send("Hello", params).text + "\n" + chat.send("More", params).text + "\n"
        assert f"position {chat.session.position:,}," in said.err
        session.load(state)
        assert session.state() == chat.session.state()
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert run_main([*chat_command, "--load-state", state, "--prompt", "Go on", *flags]) == 0
        assert capsys.readouterr().out == Chat(llm, session=session).send("Go on", params).text + "\n"


def test_a_message_that_fails_leaves_the_conversation(
    chat_command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ud800\nHello\n"))
    assert run_main([*chat_command, "--regex", "[ab]{4}"]) == 1
    said = capsys.readouterr()
    assert re.search(r"^[ab]{4}$", said.out, re.M)
    assert "Unicode" in said.err


def test_run_writes_what_it_is_told_to(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    common = [str(bundle), "--prompt", "x", "--max-tokens", "60", "--temperature", "1"]
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    assert run_main([*common, "--json-schema", str(tmp_path / "schema.json")]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
    assert run_main([*common, "--regex", "abcd", "--stop", "zz", "--stop", "c"]) == 0
    assert capsys.readouterr().out == "ab\n"
    for wrong in (
        ["--regex", "("],
        ["--regex", "a", "--json-schema", str(tmp_path / "schema.json")],
        ["--system", "Be brief."],
        ["--min-p", "2"],
        ["--stop", ""],
        ["--chat"],
    ):
        assert run_main([*common, *wrong]) == 1
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["head", "full disk"])
def test_a_stdout_that_takes_no_more(cpu: Backend, reader: str) -> None:
    script = "import sys; from lococo_runtime.cli import run_main; sys.exit(run_main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, str(cpu.bundle("text")), "--prompt", "x", "--temperature", "1"]
    with Path("/dev/full").open("w") as full:
        stdout = full if reader == "full disk" else subprocess.PIPE
        with subprocess.Popen([*command, "--max-tokens", "30000"], stdout=stdout, stderr=subprocess.PIPE) as process:
            assert process.stderr
            if process.stdout:
                process.stdout.read(10)
                process.stdout.close()
            err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert ("error: " in err) == (reader == "full disk")


def test_ctrl_c_ends_an_answer_and_not_the_conversation(chat_command: list[str]) -> None:
    pytest.importorskip("llguidance")
    script = "import sys; from lococo_runtime.cli import run_main; sys.exit(run_main(sys.argv[1:]))"
    flags = ["--max-tokens", "100000000", "--regex", "(abc ){5000}"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *chat_command, *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        guard = threading.Timer(60, process.kill)
        guard.start()
        for _ in range(2):
            process.stdin.write("Hello\n")
            process.stdin.flush()
            assert process.stdout.read(8) == "abc abc "
            process.send_signal(signal.SIGINT)
            process.stdout.readline()
        _, err = process.communicate()
        guard.cancel()
    assert process.returncode == 0
    assert err.count("wrote") == 2
    assert "position" in err
