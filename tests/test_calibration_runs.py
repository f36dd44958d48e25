"""lococo-fit and lococo-eval end to end on a tiny model: text, killed runs, checkpoints, bundles, bad input."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lococo_calibration import DivergedError, Fit, FitSettings, data, load_corpus
from lococo_calibration.blocks import FullCache, Fusion, read_uncompressed
from lococo_calibration.cli import eval_main, fit_main
from lococo_calibration.data import batch_windows
from lococo_calibration.evaluate import (
    PasskeyPrompt,
    passkey_model,
    passkey_prompts,
    passkey_session,
    read_forwards,
    session_nll,
    window_nll,
)
from lococo_calibration.ruler import (
    RULER_TASKS,
    RulerPrompt,
    make_prompts,
    read_prompts,
    ruler_rows,
    save_prompts,
    score,
)
from lococo_runtime import CorruptError, InvalidArgumentError, NotFoundError, Session
from lococo_runtime._exceptions import (
    ConfigError,
    NoSpaceError,
    OutOfMemoryError,
    TargetExistsError,
    UnsupportedError,
)
from lococo_runtime.bundle import LococoConfig
from lococo_runtime.llm import load_tokenizer
from safetensors.torch import load_file
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lococo_export import export_bundle, load_checkpoint
from lococo_export.reference import ReferenceModel, ReferenceSession

LETTERS = [*map(chr, range(32, 127)), "\n"]
SMALL: dict[str, Any] = {
    "mem_size": 12, "local_len": 3, "block_size": 8, "buffer": 4, "kernel_size": 5, "context": 64, "batch": 4,
    "decode_fusions": 3, "steps": 12, "eval_every": 0, "save_every": 4, "device": "cpu",
}  # fmt: skip


def save_tokenizer(path: Path) -> None:
    """One token a character: 96 of them."""
    Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, [])).save(str(path / "tokenizer.json"))


def random_text(n: int, seed: int) -> str:
    """Words that come back, so that there is something to attend to."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(LETTERS[33:60], 4)) for _ in range(12)]
    return " ".join(rng.choice(words, n // 5 + 1))[:n]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    for i in range(6):
        (path / f"{i}.txt").write_text(random_text(400 + i, i))
    return path


def settings(model: Path, text: Path, output: Path, **changes: Any) -> FitSettings:
    paths = {
        "model": str(model),
        "text": (str(text),),
        "output": str(output),
        "cache_dir": str(output.parent / "cache"),
    }
    return FitSettings(**{**SMALL, **paths, **changes})


def quiet(line: str) -> None:
    pass


def log(output: Path) -> list[dict[str, Any]]:
    lines = (output.with_name(output.name + ".fit") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --- text -------------------------------------------------------------------------------------------------------------


def test_documents_of_every_kind(model: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "n": 1}\n')
    pq.write_table(pa.table({"text": ["row", None, "other row"]}), tmp_path / "c.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    for name in ("data-0.arrow", "cache-0123.arrow"):  # the other is left by a map over the dataset
        table = pa.table({"text": ["arrow" if name[0] == "d" else "changed"]})
        with pa.OSFile(str(saved / name), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table)
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet", saved]
    corpus = load_corpus(sources, model, 96, cache_dir=tmp_path / "cache")
    texts = [
        "".join(LETTERS[t] for t in corpus.tokens[a:b])
        for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    ]
    assert texts == ["plain", "first", "second", "row", "other row", "arrow"]
    assert corpus.names[1:3] == ["b.jsonl:1", "b.jsonl:3"]


def test_tokens_are_cached_by_contents(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("one two")
    first = load_corpus([file], model, 96, cache_dir=cache)
    with monkeypatch.context() as m:
        m.setattr("lococo_calibration.data._tokenise", None)  # not called
        file.touch()
        assert load_corpus([file], model, 96, cache_dir=cache).key == first.key
    file.write_text("one two three")
    assert len(load_corpus([file], model, 96, cache_dir=cache).tokens) == 13
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "b.txt").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}')
    lengths = [
        len(load_corpus([tmp_path / f"b{kind}"], model, 96, cache_dir=cache).tokens) for kind in (".txt", ".jsonl")
    ]
    assert lengths == [15, 3]


def test_two_runs_may_tokenise_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two")
    tokenise, calls = data._tokenise, []

    def both(*args: Any) -> None:
        tokenise(*args)
        calls.append(args)
        tokenise(*args)

    monkeypatch.setattr(data, "_tokenise", both)
    assert len(load_corpus([tmp_path / "a.txt"], model, 96, cache_dir=tmp_path / "cache").tokens) == 7
    assert calls
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_damaged_caches_are_refused(model: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("one two")
    load_corpus([file], model, 96, cache_dir=cache)
    (folder,) = cache.iterdir()
    (folder / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(CorruptError, match="expected 28 bytes, got 4; delete this folder"):
        load_corpus([file], model, 96, cache_dir=cache)
    (folder / "index.json").write_text("{")
    with pytest.raises(CorruptError, match="not tokenised text"):
        load_corpus([file], model, 96, cache_dir=cache)


def test_columns_that_are_no_text_are_refused(model: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [["a", "b"]]}), tmp_path / "a.parquet")
    with pytest.raises(CorruptError, match='row 1: expected strings in the column "text", got list'):
        load_corpus([tmp_path / "a.parquet"], model, 96, cache_dir=tmp_path / "cache")


def test_windows_stay_within_documents_and_splits_apart(model: Path, text: Path, tmp_path: Path) -> None:
    corpus = load_corpus([text], model, 96, cache_dir=tmp_path)
    windows = corpus.windows(64)
    assert len(windows) == 36
    assert all(corpus.offsets[d] <= start and start + 64 <= corpus.offsets[d + 1] for d, start in windows)
    train, held_out = corpus.split(64, 0.3, seed=0)
    assert (len(train), len(held_out)) == (4, 2)
    assert sorted(train + held_out) == list(range(6))
    assert corpus.split(64, 0.3, seed=0) == (train, held_out)
    assert any(corpus.split(64, 0.3, seed=s)[1] != held_out for s in range(1, 5))
    order = [w for i in range(9) for w in batch_windows(windows, 4, i, seed=0)]
    assert sorted(order) == windows  # an epoch sees everything once
    assert batch_windows(windows, 4, 9, seed=0) != order[:4]


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        (b"", InvalidArgumentError, "the file is empty"),
        (b"caf\xe9", CorruptError, "not UTF-8 text"),
        (None, NotFoundError, "not found"),
    ],
)
def test_bad_files_are_refused(
    model: Path, tmp_path: Path, contents: bytes | None, error: type[Exception], message: str
) -> None:
    file = tmp_path / "a.txt"
    if contents is not None:
        file.write_bytes(contents)
    with pytest.raises(error, match=message):
        load_corpus([file], model, 96, cache_dir=tmp_path / "cache")


def test_bad_files_in_directories(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "good.txt").write_text("good")
    with pytest.raises(CorruptError, match=r"1 undecodable file\(s\); --skip-undecodable"):
        load_corpus([folder], model, 96, cache_dir=tmp_path / "c")
    corpus = load_corpus([folder], model, 96, skip_undecodable=True, cache_dir=tmp_path / "c")
    assert corpus.names == ["good.txt"]
    assert len(corpus.notes) == 2
    (folder / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(CorruptError, match="--text-field"):
        load_corpus([folder], model, 96, skip_undecodable=True, cache_dir=tmp_path / "c")


def test_bad_text_for_a_run(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(InvalidArgumentError, match=r"at least 1,000 tokens \(one window\), the longest of 6 has 405"):
        Fit(settings(model, text, output, context=1000))
    with pytest.raises(InvalidArgumentError, match="at least 2 documents"):
        Fit(settings(model, text / "0.txt", output))
    with pytest.raises(ConfigError, match=r"M \+ buffer = 404"):
        Fit(settings(model, text, output, mem_size=400, context=200))
    with pytest.raises(ConfigError, match="keep"):
        Fit(settings(model, text, output, local_len=8))
    assert not output.with_name("out.fit").exists()


def test_tokenizer_of_another_model(text: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", vocab_size=50)
    save_tokenizer(tmp_path / "model")
    with pytest.raises(ConfigError, match="vocabulary is 50: a tokenizer of another model"):
        Fit(settings(tmp_path / "model", text, tmp_path / "out"))
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CorruptError, match=r"tokenizer\.json: not a tokenizer: EOF"):
        Fit(settings(tmp_path / "model", text, tmp_path / "out"))
    # every token exists, but most of the model's are never used
    make_model(tmp_path / "large", vocab_size=200)
    save_tokenizer(tmp_path / "large")
    with pytest.raises(ConfigError, match="has 96 tokens, the model's vocabulary is 200: a tokenizer of another model"):
        Fit(settings(tmp_path / "large", text, tmp_path / "out"))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_fitting_lowers_the_reconstruction_loss(model: Path, text: Path, tmp_path: Path) -> None:
    """On the same windows before and after, in both regimes."""
    fit = Fit(settings(model, text, tmp_path / "out", steps=80, decode_share=0.5), show=quiet)
    ids = fit.ids(fit.windows[:16])
    plans = {fit.gradients(step)[1].regime: fit.gradients(step)[1] for step in range(8)}

    def loss(regime: str) -> float:
        total = fit.losses.new()
        fit.losses.backward(ids, plans[regime], 1.0, total)
        return float(total.layers.mean())

    before = {regime: loss(regime) for regime in ("block", "step")}
    fit.run()
    for regime in before:
        assert loss(regime) < 0.9 * before[regime]


def test_a_killed_run_resumes_to_the_same_losses(model: Path, text: Path, tmp_path: Path) -> None:
    whole = settings(model, text, tmp_path / "whole", steps=80, eval_every=40, lm_weight=0.1)
    lines: list[str] = []
    Fit(whole, show=lines.append).run()
    assert any("held-out perplexity" in line and "token by token" in line for line in lines)
    assert any("block loss" in line and "(perplexity" in line and "tokens/s" in line for line in lines)
    output = tmp_path / "killed"
    killed = dataclasses.replace(whole, output=str(output))
    config = tmp_path / "run.toml"
    values = dataclasses.asdict(killed)
    config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    process = subprocess.Popen(
        [sys.executable, "-c", "from lococo_calibration.cli import fit_main; fit_main()", "--config", str(config)],
        stderr=subprocess.DEVNULL,
    )
    logged = output.with_name("killed.fit") / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (logged.exists() and logged.read_text().count('"loss"') >= 6):
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with pytest.raises(TargetExistsError, match="pass --resume"):
        Fit(killed)
    with pytest.raises(ConfigError, match=r"cannot resume with other settings: lr: was 0.02, now 0.5"):
        Fit(dataclasses.replace(killed, lr=0.5), resume=True)
    resumed = Fit(killed, resume=True, show=quiet)
    assert 4 <= resumed.step < 80
    resumed.run()
    assert log(output) == log(tmp_path / "whole")
    for name in ("lococo_heads.safetensors", "lococo_config.json", "lococo_fit.json", "model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("changes", [{}, {"lora": 2, "lm_weight": 1.0, "tune_lr": 1e-2}], ids=["heads", "lora"])
def test_a_seed_repeats_a_run_and_another_does_not(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if changes:
        pytest.importorskip("peft")
    losses = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # whatever else drew random numbers before
        fit = Fit(settings(model, text, tmp_path / f"{i}", steps=3, seed=seed, **changes), show=quiet)
        losses.append([fit.train_step()["loss"] for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_accumulation_is_a_larger_batch(model: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for name, batch, accumulate in (("a", 4, 1), ("b", 2, 2)):
        fit = Fit(settings(model, text, tmp_path / name, batch=batch, accumulate=accumulate, decode_share=0.0))
        losses, _ = fit.gradients(0)
        found.append((losses.layers, [p.grad for p in fit.heads.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1])


def test_nan_stops_the_run_and_names_step_and_layer(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(settings(model, text, tmp_path / "out"), show=quiet)
    original = Fit.gradients

    def poisoned(self: Fit, step: int) -> Any:
        if self.step == 6:
            with torch.no_grad():
                self.heads[1].normalizer.fill_(float("nan"))
        return original(self, step)

    monkeypatch.setattr(Fit, "gradients", poisoned)
    with pytest.raises(DivergedError, match=r"step 6: loss or gradient is not finite in layer\(s\) 1;.*state.pt"):
        fit.run()
    monkeypatch.undo()
    resumed = Fit(settings(model, text, tmp_path / "out"), resume=True, show=quiet)
    assert resumed.step == 4
    resumed.run()


@pytest.mark.parametrize("loss", ["lm_weight", "distill_weight"])
def test_nan_names_the_layer_where_it_began(model: Path, text: Path, tmp_path: Path, loss: str) -> None:
    """Gradients carry it to every layer."""
    s = settings(model, text, tmp_path / "out", reconstruction_weight=0.0, accumulate=2, **{loss: 1.0})
    fit = Fit(s, show=quiet)
    fit.train_step()
    with torch.no_grad():
        fit.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = [p.clone() for p in fit.heads.parameters()]
    with pytest.raises(DivergedError, match=r"step 1: loss or gradient is not finite in layer\(s\) 1, where it began"):
        fit.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, fit.heads.parameters(), strict=True))
    assert not fit.model.model.layers[1].mlp._forward_hooks


def test_gradients_of_the_model_have_to_be_finite(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = settings(model, text, tmp_path / "out", reconstruction_weight=0.0, lm_weight=1.0, tune=("norms",))
    fit = Fit(s, show=quiet)
    original = Fit.gradients

    def poisoned(self: Fit, step: int) -> Any:
        found = original(self, step)
        self.tuned.masters[0].grad.fill_(float("inf"))
        return found

    monkeypatch.setattr(Fit, "gradients", poisoned)
    with pytest.raises(DivergedError, match="step 0: loss or gradient is not finite in weights of the model"):
        fit.train_step()
    assert all(torch.isfinite(m).all() for m in fit.tuned.masters)


def test_a_full_disk_keeps_the_last_state(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fit(settings(model, text, tmp_path / "out"), show=quiet)
    fit.train_step()
    state = fit.save_state()
    before = state.read_bytes()
    fit.train_step()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError):
        fit.save_state()
    assert state.read_bytes() == before
    assert [p.name for p in state.parent.iterdir()] == ["state.pt"]


def test_out_of_memory_says_what_to_lower(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: Fit, step: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fit, "gradients", exhausted)
    with pytest.raises(OutOfMemoryError, match=r"lower --batch \(now 4.*or pass --checkpointing"):
        Fit(settings(model, text, tmp_path / "out", lm_weight=1.0), show=quiet).run()


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
])  # fmt: skip
def test_a_machine_without_memory_says_what_to_lower(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:  # fmt: skip
    def exhausted(*args: Any, **options: Any) -> Any:
        raise error

    fit = Fit(settings(model, text, tmp_path / "out"), show=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "gradients", exhausted)
        with pytest.raises(OutOfMemoryError, match="lower --batch"):
            fit.run()
    with monkeypatch.context() as patch:
        patch.setattr("lococo_calibration.report.window_nll", exhausted)
        assert eval_main(["--model", str(model), "--text", str(text), "--contexts", "100", "--mem-size", "12",
                          "--block-size", "8", "--cache-dir", str(tmp_path)]) == 1  # fmt: skip
        assert "lower --batch (now 8)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("lococo_calibration.fit.ReferenceModel", exhausted)
        assert fit_main(["--model", str(model), "--text", str(text), "-o", str(tmp_path / "b"), "--device", "cpu",
                         "--context", "64", "--mem-size", "12", "--block-size", "8", "--local-len", "3",
                         "--cache-dir", str(tmp_path)]) == 1  # fmt: skip
        assert "while the model was loaded" in capsys.readouterr().err


def test_a_bar_has_loss_and_perplexity(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Fit(settings(model, text, tmp_path / "a", steps=3, eval_every=3), progress=True).run()
    shown = capsys.readouterr().err
    entry = [e for e in log(tmp_path / "a") if "loss" in e][-1]
    before = log(tmp_path / "a")[0]["held_out"]["lococo"]
    assert f"loss={entry['loss']:.5f}, perplexity={before:.3f}" in shown.split("3/3")[1]
    assert "held-out perplexity" in shown
    assert "min left" not in shown  # the lines that a bar replaces
    Fit(settings(model, text, tmp_path / "b", steps=2, lm_weight=1.0), show=quiet, progress=True).run()
    assert f"perplexity={log(tmp_path / 'b')[-1]['perplexity']:.3f}" in capsys.readouterr().err


def test_heads_of_an_unfinished_run_to_begin_with(model: Path, text: Path, tmp_path: Path) -> None:
    """What a run that diverged had learned goes on in another one, with other settings."""
    pytest.importorskip("peft")
    tuned = {"lora": 2, "lm_weight": 1.0, "tune": ("norms",), "tune_lr": 1e-2}
    fit = Fit(settings(model, text, tmp_path / "a", **tuned), show=quiet)
    for _ in range(3):
        fit.train_step()
    fit.save_state()
    other = Fit(settings(model, text, tmp_path / "b", lr=1e-3, init_from=str(fit.folder), **tuned), show=quiet)
    assert other.step == 0
    for mine, theirs in zip(
        [*other.heads.parameters(), *other.tuned.masters, *other.tuned.weights.values()],
        [*fit.heads.parameters(), *fit.tuned.masters, *fit.tuned.weights.values()],
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    for changes in ({**tuned, "kernel_size": 3}, {**tuned, "lora": 3}, {}):
        with pytest.raises(ConfigError, match="cannot begin with it"):
            Fit(settings(model, text, tmp_path / "c", init_from=str(fit.folder), **changes), show=quiet)


def test_damaged_states_and_taken_targets(model: Path, text: Path, tmp_path: Path) -> None:
    s = settings(model, text, tmp_path / "out", steps=1)
    with pytest.raises(NotFoundError, match="nothing to resume"):
        Fit(s, resume=True)
    fit = Fit(s, show=quiet)
    fit.run()
    with pytest.raises(TargetExistsError, match="--force"):
        Fit(s)
    (fit.folder / "state.pt").write_bytes(b"not a state")
    with pytest.raises(CorruptError, match="not a state of lococo-fit"):
        Fit(s, resume=True, force=True)
    Fit(s, force=True, show=quiet).run()


def test_heads_to_begin_with(model: Path, text: Path, tmp_path: Path) -> None:
    Fit(settings(model, text, tmp_path / "a", steps=3), show=quiet).run()
    more = Fit(settings(model, text, tmp_path / "b", init_from=str(tmp_path / "a"), seed=7))
    stored = load_checkpoint(tmp_path / "a").heads
    torch.testing.assert_close(more.heads[1].weights[0].detach(), stored[1].convs[0][0])
    with pytest.raises(ConfigError, match="kernel_size: expected 3, got 5"):
        Fit(settings(model, text, tmp_path / "b", init_from=str(tmp_path / "a"), kernel_size=3))


def test_configuration_files(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.toml"
    config.write_text('mem-size = 12\nstps = 3\ntext = ["x"]\n')
    assert fit_main(["--config", str(config)]) == 1
    assert "unknown settings ['stps']" in capsys.readouterr().err
    config.write_text("mem-size = 12\nmem_size = 14\n")
    assert fit_main(["--config", str(config)]) == 1
    assert "given twice" in capsys.readouterr().err
    values = {k.replace("_", "-"): v for k, v in SMALL.items()}
    config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
    paths = ["--model", str(model), "--text", str(text), "-o", str(tmp_path / "out"), "--cache-dir", str(tmp_path)]
    assert fit_main(["--config", str(config), *paths, "--estimate-only", "--steps", "2"]) == 0
    assert "estimate: 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert fit_main(["--config", str(config), *paths, "--steps", "2"]) == 0
    assert "2 steps" in capsys.readouterr().out


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted checkpoint, and its bundle beside it."""
    root = tmp_path_factory.mktemp("fitted")
    aging = {"score_decay": 0.9, "decay_per": "token"}
    Fit(settings(model, text, root / "ckpt", steps=5, held_out=0.3, **aging), show=quiet).run()
    export_bundle(load_checkpoint(root / "ckpt"), root / "bundle")
    return root / "ckpt"


def test_a_fitted_checkpoint_gives_the_same_perplexity_in_the_runtime(
    fitted: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(fitted), "--bundle", str(fitted.parent / "bundle"), "--text", str(text),
                 "--contexts", "32", "128", "--regimes", "block", "step", "--windows", "4", "--passkey", "340",
                 "--cache-dir", str(tmp_path), "--json", str(tmp_path / "out.json"), "--dtype", "fp32"]  # fmt: skip
    assert eval_main(arguments) == 0
    captured = capsys.readouterr()
    assert "4 document(s) left out" in captured.err
    assert "from pytorch" in captured.out
    document = json.loads((tmp_path / "out.json").read_text())
    found = {(r["policy"], r["regime"], r["context"], r["backend"]): r["perplexity"] for r in document["perplexity"]}
    for regime in ("block", "step"):
        for context in (32, 128):
            expected = found["lococo", regime, context, "pytorch"]
            assert found["lococo", regime, context, "onnxruntime"] == pytest.approx(
                expected, rel=2e-5
            )  # 0.1 % is asked
    # policies and regimes differ by far more, so that the comparison means something
    at_32 = [found["full", "block", 32, "pytorch"], *(found["lococo", r, 32, "pytorch"] for r in ("block", "step"))]
    assert min(abs(a / b - 1) for a, b in itertools.combinations(at_32, 2)) > 1e-3
    assert {"full", "lococo", "h2o", "streaming"} == {r["policy"] for r in document["perplexity"]}
    assert {r["backend"] for r in document["passkey"]} == {"pytorch", "onnxruntime"}


def test_evaluation_of_a_plain_model(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--text", str(text), "--cache-dir", str(tmp_path), "--block-size", "16"]
    assert eval_main([*arguments, "--contexts", "128", "--mem-size", "8", "24"]) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "full", "h2o", "streaming", "h2o", "streaming"
    ]  # fmt: skip
    assert eval_main([*arguments, "--contexts", "128", "--mem-size", "256"]) == 1
    assert "no fusion ever happens" in capsys.readouterr().err
    assert eval_main([*arguments, "--contexts", "4096"]) == 1
    assert "at least 4,096 tokens (one window)" in capsys.readouterr().err
    assert eval_main(["--model", str(model)]) == 1
    assert "--text for perplexity" in capsys.readouterr().err


def test_documents_the_heads_were_fitted_on_are_refused(
    fitted: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((fitted / "lococo_fit.json").read_text())
    trained = text / record["trained_on"][0]["name"]
    assert eval_main(["--model", str(fitted), "--text", str(trained), "--cache-dir", str(tmp_path)]) == 1
    assert "fitted on every one" in capsys.readouterr().err


def test_a_damaged_record_is_refused(
    fitted: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(fitted, copy)
    (copy / "lococo_fit.json").write_text('{"trained_on": [1]}')
    args = ["--model", str(copy), "--text", str(text), "--cache-dir", str(tmp_path / "c")]
    assert eval_main(args) == 1
    assert "lococo_fit.json: not a record of lococo-fit" in capsys.readouterr().err


def test_passkey_prompts(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = passkey_prompts(tokenizer, 500, [0.0, 0.5, 1.0], trials=2, seed=0)
    assert [p.depth for p in prompts] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert {len(p.ids) for p in prompts} == {500}
    places = []
    for prompt in prompts:
        whole, answer = ("".join(LETTERS[i] for i in ids) for ids in (prompt.ids, prompt.answer))
        assert answer.strip().isdigit()
        assert whole.count(answer.strip()) == 2
        assert whole.endswith("The pass key is")
        places.append(whole.index(answer.strip()))
    assert places[0] < places[2] < places[4]
    with pytest.raises(InvalidArgumentError, match="expected a context of at least"):
        passkey_prompts(tokenizer, 50, [0.0], trials=1, seed=0)


def test_needles_in_documents(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    documents = [[i] * 500 for i in (1, 2)]
    prompts = passkey_prompts(tokenizer, 300, [0.0, 1.0], trials=2, seed=0, haystack=documents)
    assert [len(p.ids) for p in prompts] == [300] * 4
    assert [p.ids.count(1) > 50 for p in prompts] == [True, False, True, False]
    with pytest.raises(InvalidArgumentError, match="expected documents of"):
        passkey_prompts(tokenizer, 300, [0.0], trials=1, seed=0, haystack=[[1] * 20])


def test_passkey_is_greedy_decoding(fitted: Path) -> None:
    """Answers made by greedy decoding count as right, and any other token makes them wrong; in the runtime too."""
    reference = ReferenceModel(load_checkpoint(fitted))
    rng = np.random.default_rng(0)
    prompts, expected = [], []
    for i in range(6):
        ids = rng.integers(3, 96, 50).tolist()
        session = ReferenceSession(reference)
        logits = session.prefill(ids)
        answer = []
        for _ in range(4 + i % 2):
            answer.append(int(logits.argmax()))
            logits = session.step(answer[-1])
        if i % 3 == 2:
            answer[-1] = (answer[-1] + 1) % 96
        prompts.append(PasskeyPrompt(ids, answer, 0.0))
        expected.append(i % 3 != 2)
    policy = Fusion(reference.cache, reference.heads)
    assert passkey_model(reference, policy, prompts, block_size=8, batch=4) == expected
    with Session(fitted.parent / "bundle") as bundle:
        assert passkey_session(bundle, prompts) == expected


# --- what a run can do beside training heads --------------------------------------------------------------------------


def test_two_processes_are_a_larger_batch(model: Path, text: Path, tmp_path: Path) -> None:
    """torchrun with two processes of batch 2 against one process of batch 4: the same losses, heads and model."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    common = ["--model", str(model), "--text", str(text), "--cache-dir", str(tmp_path / "cache"), "--steps", "5"]
    common += ["--lm-weight=0.3", "--distill-weight=0.3", "--tune", "norms", "--lora=2", "--tune-lr=0.01"]
    common += [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k not in ("batch", "steps")]
    code = "import sys; from lococo_calibration.cli import fit_main; sys.exit(fit_main())"
    (tmp_path / "fit.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, start, batch in (("one", [sys.executable], 4), ("two", launch, 2)):
        command = [*start, str(tmp_path / "fit.py"), *common, "--batch", str(batch), "-o", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    one, two = ([e["loss"] for e in log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    saved = [load_checkpoint(tmp_path / name) for name in ("one", "two")]
    torch.testing.assert_close(saved[0].heads[0].convs[0][0], saved[1].heads[0].convs[0][0], atol=1e-3, rtol=1e-3)
    for name in ("layers.1.self_attn.q_proj.weight", "layers.0.input_layernorm.weight"):
        one_, two_ = (checkpoint.tensors[f"model.{name}"] for checkpoint in saved)
        torch.testing.assert_close(one_, two_, atol=1e-3, rtol=1e-3)
    assert "of 4 windows" in (tmp_path / "two" / "README.md").read_text()


def test_a_sliding_window_is_no_full_cache(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond it the model itself sees less than a cache that keeps all."""
    make_model(tmp_path / "model", "mistral", sliding_window=100)
    save_tokenizer(tmp_path / "model")
    for weights in ({}, {"distill_weight": 1.0, "reconstruction_weight": 0.0}):
        with pytest.raises(ConfigError, match=r"looks back 100 tokens .*no teacher beyond"):
            Fit(settings(tmp_path / "model", text, tmp_path / "out", context=101, **weights), show=quiet)
        Fit(settings(tmp_path / "model", text, tmp_path / "out", context=100, **weights), show=quiet)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(text), "--mem-size", "12", "--block-size", "8",
                 "--cache-dir", str(tmp_path)]  # fmt: skip
    assert eval_main([*arguments, "--contexts", "64", "128"]) == 1
    assert "a full cache of 128 goes beyond" in capsys.readouterr().err
    assert eval_main([*arguments, "--contexts", "64", "128", "--policies", "h2o"]) == 0
    assert eval_main([*arguments, "--contexts", "64"]) == 0


def test_a_cpu_has_no_cuda_graphs(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cuda_graphs: expected a CUDA GPU, but the run is on cpu"):
        Fit(settings(model, text, tmp_path / "out", cuda_graphs=True))


def test_two_gpus_beside_one(model: Path, text: Path, tmp_path: Path) -> None:
    """scripts/two_gpus.py, on two processes of the CPU."""
    pytest.importorskip("accelerate")
    script = Path(__file__).resolve().parent.parent / "scripts" / "two_gpus.py"
    out = tmp_path / "out.json"
    command = [sys.executable, str(script), "--model", str(model), "--text", str(text), "-o", str(out),
               "--device", "cpu", "--steps", "6", "--batch", "4", "--losses", "reconstruction"]  # fmt: skip
    command += [x for k, v in SMALL.items() if k not in ("batch", "steps", "eval_every", "device")
                for x in ("--set", f"{k}={v}")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["device"], document["processes"]) == ("cpu", 2)
    found = document["losses"]["reconstruction"]
    assert found["largest_difference"] < 1e-4
    assert len(found["several"]["losses"]) == 6
    assert found["one"]["losses"][0] == pytest.approx(found["several"]["losses"][0], rel=1e-4)
    assert all(v > 0 for v in found["several"]["tokens_per_second"].values())


@pytest.mark.parametrize("changes", [{"tune": ("norms",)}, {"tune": ("norms", "embeddings")}, {"lora": 4}], ids=str)
def test_weights_of_the_model_are_tuned_and_saved(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    s = settings(model, text, tmp_path / "out", steps=4, lm_weight=1.0, reconstruction_weight=0.0, tune_lr=1e-2,
                 save_every=2, **changes)  # fmt: skip
    fit = Fit(s, show=quiet)
    fit.run()
    before, after = load_checkpoint(model, policy="h2o", mem_size=12).tensors, load_checkpoint(tmp_path / "out").tensors
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".")[-2] for name in changed}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert (
        kinds
        == {
            "lora": {"q_proj", "k_proj", "v_proj", "o_proj"},
            "norms": norms,
            "norms embeddings": norms | {"embed_tokens"},
        }[" ".join(changes["tune"]) if "tune" in changes else "lora"]
    )
    # what was saved is what was trained
    ids = fit.ids(fit.windows[:2])
    saved = ReferenceSession(ReferenceModel(load_checkpoint(tmp_path / "out")), 2).prefill(ids, return_all=True)
    hidden = torch.cat([h for _, h in read_forwards(fit.model, fit.losses.policy, ids, 8)], 1)
    torch.testing.assert_close(fit.model.lm_head(hidden), saved, atol=1e-4, rtol=1e-3)


def test_lora_reaches_further_with_scaled_positions(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    document = tmp_path / "long.txt"
    document.write_text(random_text(2 * limit + 10, 0))
    more = {"context": 2 * limit, "lora": 2, "steps": 1, "batch": 1, "held_out": 0.0, "decode_share": 0.0}
    with pytest.raises(ConfigError, match="no teacher"):
        Fit(settings(model, document, tmp_path / "out", lm_weight=1.0, **more))
    fit = Fit(settings(model, document, tmp_path / "out", lm_weight=1.0, reconstruction_weight=0.0, **more), show=quiet)
    fit.run()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2 * limit
    rope = load_checkpoint(tmp_path / "out").geometry.rope
    assert (rope["type"], rope["factor"]) == ("linear", 2.0)
    # transformers reads the same model from it, with the merged weights: without a fusion, logits are its own
    ids = fit.ids(fit.windows[:1])
    saved = ReferenceModel(load_checkpoint(tmp_path / "out"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")(ids).logits
        torch.testing.assert_close(saved.lm_head(read_uncompressed(saved, ids)), expected, atol=1e-4, rtol=1e-4)
        trained = fit.model.lm_head(read_uncompressed(fit.model, ids))
    torch.testing.assert_close(trained, expected, atol=1e-4, rtol=1e-4)
    # and the runtime reads beyond the trained positions as PyTorch does, through all fusions
    nll = window_nll(saved, Fusion(saved.cache, saved.heads), ids.numpy(), block_size=8)
    export_bundle(load_checkpoint(tmp_path / "out"), tmp_path / "bundle")
    with Session(tmp_path / "bundle") as session:
        found = session_nll(session, ids.numpy())
    np.testing.assert_allclose(found, nll, atol=1e-3)
    assert float(np.exp(found.mean())) == pytest.approx(float(np.exp(nll.mean())), rel=1e-4)


def test_yarn_reaches_further_than_the_windows_and_the_plain_model_teaches(
    model: Path, text: Path, tmp_path: Path
) -> None:
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    more = {"positions": 4 * limit, "rope_scaling": "yarn", "tune": ("norms",), "distill_weight": 1.0, "steps": 1}
    fit = Fit(settings(model, text, tmp_path / "out", reconstruction_weight=0.0, **more), show=quiet)
    plain = ReferenceModel(load_checkpoint(model, policy="h2o", mem_size=12))
    torch.testing.assert_close(fit.losses.teacher.inv_freq, plain.inv_freq)
    assert not torch.equal(fit.model.inv_freq, plain.inv_freq)
    fit.run()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4 * limit
    saved = ReferenceModel(load_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(saved.inv_freq, fit.model.inv_freq)
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    torch.testing.assert_close(saved.inv_freq.float(), inv_freq)
    assert attention_factor == 1


def test_tuning_needs_a_loss_that_reaches_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reconstruction has no gradient"):
        settings(model, text, tmp_path / "out", tune=("norms",))
    assert settings(model, text, tmp_path / "out", tune=("norms,embeddings",), lm_weight=1.0).tune == (
        "norms", "embeddings")  # fmt: skip
    with pytest.raises(ConfigError, match="expected some of norms, embeddings, got heads"):
        settings(model, text, tmp_path / "out", tune=("heads",), lm_weight=1.0)


def test_distillation_keeps_the_untuned_model_as_teacher(model: Path, text: Path, tmp_path: Path) -> None:
    s = settings(model, text, tmp_path / "out", tune=("norms",), distill_weight=1.0, reconstruction_weight=0.0)
    fit = Fit(s, show=quiet)
    plain = ReferenceModel(load_checkpoint(model, policy="h2o", mem_size=12))
    with torch.no_grad():
        fit.tuned.masters[0].mul_(1.5)
    fit.tuned.scatter()
    assert torch.equal(fit.losses.teacher.model.layers[0].input_layernorm.weight,
                       plain.model.layers[0].input_layernorm.weight)  # fmt: skip
    assert not torch.equal(fit.model.model.layers[0].input_layernorm.weight,
                           plain.model.layers[0].input_layernorm.weight)  # fmt: skip


def test_normalizers_stay_within_0_and_1(model: Path, text: Path, tmp_path: Path) -> None:
    """Beyond, every fusion extrapolates, and hundreds of them, as in decoding, grow without bound."""
    fit = Fit(settings(model, text, tmp_path / "out", normalizer_lr=5.0, steps=3, warmup=0), show=quiet)
    fit.run()
    record = json.loads((tmp_path / "out" / "lococo_fit.json").read_text())
    assert all(0 <= n <= 1 for n in record["normalizers"])


def test_tensorboard_has_losses_and_held_out_perplexities(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = settings(model, text, tmp_path / "out", steps=3, eval_every=3, decode_share=0.0, tensorboard=True)
    Fit(s, show=quiet).run()
    events = EventAccumulator(str(tmp_path / "out.fit" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("block/loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("block/loss")] == pytest.approx(
        [e["loss"] for e in log(tmp_path / "out") if "loss" in e], rel=1e-5
    )
    assert "held_out/lococo" in events.Tags()["scalars"]


def test_model_card(fitted: Path) -> None:
    card = (fitted / "README.md").read_text()
    record = json.loads((fitted / "lococo_fit.json").read_text())
    assert "M = 12" in card
    assert "5 of 4 windows of 64 tokens, seed 0" in card
    assert all(d["name"] in card for d in record["trained_on"])


# --- plots, and tasks of lm-evaluation-harness ------------------------------------------------------------------------


def test_plots(fitted: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--model", str(fitted), "--text", str(text), "--contexts", "32", "64", "--windows", "2",
                 "--passkey", "340", "--needle", "300", "--passkey-trials", "1", "--cache-dir", str(tmp_path),
                 "--plots", str(tmp_path / "plots")]  # fmt: skip
    assert eval_main(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "passkey.png", "passkey.svg", "perplexity.png", "perplexity.svg"
    ]  # fmt: skip
    assert "lococo M=12 block" in (tmp_path / "plots" / "perplexity.svg").read_text()


class Request:
    """What the harness asks."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_harness_model_scores_and_generates(fitted: Path) -> None:
    pytest.importorskip("lm_eval")
    from lococo_calibration.harness import LococoLM

    lm = LococoLM.load(fitted)
    reference = ReferenceSession(ReferenceModel(load_checkpoint(fitted)))
    context, continuation = "abcd efgh " * 5 + "abcd", " efgh"
    ids = [LETTERS.index(c) for c in context + continuation]
    logits = reference.prefill(ids[:-1], return_all=True)[0, len(context) - 1 :]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[len(context) :])[:, None]).sum()
    whole_text = LETTERS[1] * 5 + context + continuation
    whole_ids = [lm.eot_token_id, *map(LETTERS.index, whole_text)]
    rolling = ReferenceSession(reference.model).prefill(whole_ids[:-1], return_all=True)[0].log_softmax(-1)
    expected_rolling = rolling.gather(1, torch.tensor(whole_ids[1:])[:, None]).sum()
    assert lm.loglikelihood_rolling([Request(whole_text)]) == [pytest.approx(float(expected_rolling), abs=1e-3)]
    score, greedy = lm.loglikelihood([Request(context, continuation)], disable_tqdm=True)[0]
    assert score == pytest.approx(float(expected), abs=1e-4)
    assert greedy == bool((logits.argmax(-1) == torch.tensor(ids[len(context) :])).all())
    reference = ReferenceSession(reference.model)
    logits = reference.prefill([LETTERS.index(c) for c in context])
    found = ""
    for _ in range(12):
        found += LETTERS[int(logits.argmax())]
        logits = reference.step(int(logits.argmax()))
    # this tokenizer puts a space between tokens
    whole = lm.generate_until([Request(context, {"max_gen_toks": 12, "until": []})])[0]
    assert whole == " ".join(found)
    stop = found[4]
    until = lm.generate_until([Request(context, {"max_gen_toks": 12, "until": [stop]})])
    assert until == [whole.split(stop)[0]]
    with pytest.raises(InvalidArgumentError, match="sampling"):
        lm.generate_until([Request(context, {"do_sample": True})])


def test_answers_are_scored_as_the_harness_scores_them() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    for answer in ("", " 12\n", "the Words are apple,\tPEAR\x07plum", "app\nle pear", "apple"):
        for outputs in (["apple", "pear", "plum"], ["app\nle"], ["12"], ["APPLE", "x"]):
            assert score(answer, outputs) == string_match_all(postprocess_pred([answer]), [outputs])


def test_tasks_and_contexts_that_nothing_can_be_said_about(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--mem-size", "12", "--block-size", "8"]
    assert eval_main([*arguments, "--tasks", "niah_single_1", "--task-limit", "0"]) == 1
    assert "--task-limit: expected at least 1, got 0" in capsys.readouterr().err
    assert eval_main([*arguments, "--mem-size", "900", "--passkey", "500"]) == 1
    assert "no fusion ever happens (mem_size=900" in capsys.readouterr().err
    pytest.importorskip("lm_eval")
    assert eval_main([*arguments, "--tasks", "no_such_task"]) == 1
    assert "error: tasks: Spec 'no_such_task' is not a registered task" in capsys.readouterr().err


def test_prompts_are_kept_in_a_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "ruler.json"
    prompts = [RulerPrompt("ruler_vt", 512, "abc = 1\nabc", 11, ["abc"], 30)]
    save_prompts(path, prompts)
    assert read_prompts(path) == prompts
    reference = ReferenceModel(load_checkpoint(model, policy="h2o", mem_size=12))
    prompts = [dataclasses.replace(prompts[0], tokens=4)]
    with pytest.raises(ConfigError, match="prompt of 4 tokens, got 11: made for another tokenizer"):
        ruler_rows(reference, FullCache(), load_tokenizer(model), prompts, block_size=8)
    path.write_text('[{"task": 1}]')
    with pytest.raises(CorruptError, match="not prompts of RULER"):
        read_prompts(path)


@pytest.mark.skipif(not os.environ.get("LOCOCO_RULER"), reason="makes RULER's data for minutes; set LOCOCO_RULER=1")
@pytest.mark.filterwarnings("ignore")
def test_ruler_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tasks make their data here, with the model's tokenizer: the first examples of every length, the same for all
    policies, and the same that scripts/fit_heads.py measures on."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("wonderwords")
    make_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.decoder = decoders.Fuse()  # no spaces between characters
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    tasks = ["niah_single_1", "niah_multikey_2"]
    arguments = ["--model", str(tmp_path / "model"), "--tasks", *tasks, "--task-lengths", "1536", "2048",
                 "--task-limit", "3", "--block-size", "512", "--mem-size", "64", "--batch", "4"]  # fmt: skip
    asked: list[Any] = []

    def answer(*args: Any, **options: Any) -> list[list[int]]:
        asked.append(args[2])
        return list(args[2])  # the whole prompt holds the answer; what this model says does not

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lococo_calibration.harness.generate", answer)
        patch.setattr("lococo_calibration.ruler.generate", answer)
        assert eval_main([*arguments, "--json", str(tmp_path / "out.json")]) == 0, capsys.readouterr().err
        batches = [prompt for prompts in asked for prompt in prompts]
        assert len(batches) == 3 * len(tasks) * 2 * 3
        assert batches[:12] == batches[12:24] == batches[24:]
        prompts = make_prompts(tmp_path / "model", [1536, 2048], 3, tasks=tasks)
        model = ReferenceModel(load_checkpoint(tmp_path / "model", policy="h2o", mem_size=64))
        found = ruler_rows(model, FullCache(), load_tokenizer(tmp_path / "model"), prompts, block_size=512)
    assert sorted(batches[:12]) == sorted(asked[-1])
    rows = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert [(r["policy"], r["task"], r["metric"]) for r in rows] == [
        (policy, task, metric)
        for policy in ("full", "h2o", "streaming")
        for task in tasks
        for metric in ("1536", "2048")
    ]
    assert {(r["task"], int(r["metric"]), r["value"]) for r in rows} == {(r.task, r.context, r.score) for r in found}
    assert all(r.score > 0 for r in found)


# --- comparing recipes ------------------------------------------------------------------------------------------------


def test_recipes_are_compared_and_tabulated(model: Path, text: Path, tmp_path: Path) -> None:
    """scripts/fit_heads.py on the tiny model, and scripts/quality_tables.py on what it leaves."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    for part in ("train", "held_out/prose", "held_out/code"):
        (corpus / part).mkdir(parents=True)
    for i in range(4):
        (corpus / "train" / f"{i}.txt").write_text(random_text(900, i))
    (corpus / "held_out" / "prose" / "a.txt").write_text(random_text(900, 10))
    (corpus / "held_out" / "code" / "b.py").write_text(random_text(900, 11))
    plan = tmp_path / "plan.toml"
    plan.write_text("""
[common]
mem_size = 12
local_len = 3
block_size = 8
buffer = 4
kernel_size = 5
context = 64
batch = 2
decode_fusions = 3
device = "cpu"
[[job]]
name = "m12"
seconds = 20
stages = [{steps=3}, {steps=2, reconstruction_weight=0.0, distill_weight=1.0}]
[[job]]
name = "baselines"
block_sizes = [8]
mem_sizes = [12]
[[job]]
name = "order"
block_sizes = [8]
mem_sizes = [12]
unfused_only = true
pieces = ["block"]
unfused = [{local_len=0, score_decay=0.9}]
verbatim = [{keep=9, local_len=0, score_decay=0.9, kernel_size=5}]
""")
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    prompts = [RulerPrompt(task, context, random_text(context - 20 - i, i), context - 20 - i, list("aeT9~Z"), 9 + i)
               for task in RULER_TASKS for context in (90, 120) for i in range(3)]  # fmt: skip
    save_prompts(corpus / "ruler.json", prompts)
    command = [sys.executable, str(scripts / "fit_heads.py"), str(plan), "--model", str(model), "--corpus", str(corpus),
               "--out", str(out), "--context", "256", "--step-context", "256", "--windows", "1", "--passkey", "500",
               "--trials", "1", "--needle", "400", "--ruler", "90", "120", "--ruler-examples", "2",
               "--every", "3", "--budget-seconds", "300", "--devices", "2", "--parallel", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert all((out / f"device{i}.lock").exists() for i in range(2))  # a GPU each
    record = json.loads((out / "m12.json").read_text())
    assert record["done"], done.stdout + done.stderr
    assert [s["settings"]["steps"] for s in record["stages"]] == [3, 2]
    assert load_checkpoint(out / "stages" / "m12-1").heads
    spec = importlib.util.spec_from_file_location("quality_tables", scripts / "quality_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text_of = tables.run_tables(out)
    row = next(r for r in record["perplexity"] if (r["context"], r["regime"], r["kind"]) == (256, "block", "code"))
    assert f"| {row['perplexity']:.3f} |" in text_of
    assert len([line for line in text_of.splitlines() if line.startswith("| m12 | code | 12 | step | 256")]) == 1
    # without recent slots the order of slots does not matter, and nothing is mixed
    order = json.loads((out / "order.json").read_text())["perplexity"]
    unfused, verbatim = ([r["nll"] for r in order if r["policy"].startswith(p)] for p in ("unfused", "verbatim"))
    assert len(unfused) == 2
    assert verbatim == pytest.approx(unfused, rel=1e-6)
    ours, theirs = (
        next(r for r in json.loads((out / f"{name}.json").read_text())["every"]
             if (r["policy"], r["kind"], r["regime"]) == (policy, "prose", "step"))
        for name, policy in (("m12", "lococo"), ("baselines", "h2o"))
    )  # fmt: skip
    assert len(ours["window_nll"]) == len(theirs["window_nll"]) == 3
    percent = 100 * (ours["perplexity"] / theirs["perplexity"] - 1)
    assert f"| 3 of 256 | {ours['perplexity']:.3f} | {percent:+.2f} % ± " in text_of
    # answers of the heads that were saved, one prompt after the other; the first two of each
    loaded = load_checkpoint(out / "stages" / "m12-1")
    reference = ReferenceModel(loaded)
    found = [p for p in prompts if p.context == 120][:2]
    values = []
    for prompt in found:
        session, answer = ReferenceSession(reference), ""
        logits = session.prefill([LETTERS.index(c) for c in prompt.prompt])
        for _ in range(prompt.max_new_tokens):
            token = int(logits.argmax())
            if token in reference.geometry.eos_token_ids:
                break
            answer += LETTERS[token]
            logits = session.step(token)
        values.append(score(answer, prompt.outputs))
    scores = [r for r in record["ruler"] if r["context"] == 120]
    assert [(r["task"], r["policy"], r["examples"]) for r in scores] == [(task, "lococo", 2) for task in RULER_TASKS]
    assert scores[0]["score"] == sum(values) / 2
    cells = " | ".join(f"{r['score']:.2f}" for r in scores)
    assert f"| 120 | 12 | lococo (m12) | {cells} |" in text_of
    assert len([line for line in text_of.splitlines() if line.startswith("| text | 400 | 12 | ")]) == 3


def test_shipped_heads_are_whole() -> None:
    folder = Path(__file__).resolve().parent.parent / "heads" / "smollm2-135m-instruct-m128"
    assert (folder / "lococo_heads.safetensors").stat().st_size < 11_000_000
    document = json.loads((folder / "lococo_config.json").read_text())
    config = LococoConfig(**{k: v for k, v in document.items() if k not in ("format", "schema_version")})
    assert (config.mem_size, config.block_size) == (128, 512)
    tensors = load_file(folder / "lococo_heads.safetensors")
    assert len(tensors) == 30 * 3
    assert tensors["layers.29.conv.0.weight"].shape == (config.num_mixed, 128, config.kernel_size)
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert all(0 <= float(tensors[f"layers.{i}.normalizer"]) <= 1 for i in range(30))
    card = (folder / "README.md").read_text()
    measured = json.loads((folder.parent.parent / "docs" / "quality" / "final" / "m128.json").read_text())
    for row in measured["perplexity"]:  # the card says what was measured
        line = f"| {row['kind']} | {row['regime']} | {row['context']:,} |"
        assert f"{row['perplexity']:.3f}" in next(found for found in card.splitlines() if found.startswith(line))
