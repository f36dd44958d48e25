"""The session: cadence, state, sampling, and every refusal."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SESSION, VOCAB
from conftest import Backend
from lococo_runtime import (
    BackendError,
    BusyError,
    CancelledError,
    ClosedError,
    CorruptError,
    EmptyPromptError,
    InvalidArgumentError,
    Model,
    NotFoundError,
    SamplingParams,
    Session,
    StateMismatchError,
    StorageError,
    TokenIdError,
    UnsupportedError,
    VersionError,
    _c_api,
)
from lococo_runtime._process import memory_bytes

M, BUFFER, BLOCK, CAPACITY = SESSION.mem_size, SESSION.buffer, SESSION.block_size, SESSION.capacity


@pytest.fixture(scope="module", params=["session", "session-accumulated"])
def model(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Model]:
    with Model(backend.bundle(request.param), **backend.options) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_bundle(cpu: Backend) -> Path:
    return cpu.bundle("session")


@pytest.fixture
def session(backend: Backend) -> Iterator[Session]:
    with Session(backend.bundle("session"), **backend.options) as s:
        yield s


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, n).tolist()


def official_lengths(forwards: list[int]) -> list[int]:
    """Cached length after every forward by the lazy rule: compress at the start of the next forward if over M + 16."""
    lengths, cached = [], 0
    for n in forwards:
        if cached > M + BUFFER:
            cached = M
        cached += n
        lengths.append(cached)
    return lengths


# --- cadence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 15, 31, 32, 33, 39, 40, 41, 79, 80, 81, 121])
def test_live_slots_follow_the_official_lengths(session: Session, prompt: int) -> None:
    forwards = [BLOCK] * (prompt // BLOCK) + ([prompt % BLOCK] if prompt % BLOCK else [])
    session.prefill(text(prompt))
    for _ in range(40):
        forwards.append(1)
        session.step(5)
        official = official_lengths(forwards)[-1]
        assert session.live_slots == (M if official > CAPACITY else official)
        assert session.position == sum(forwards)
    fusions = sum(length > CAPACITY for length in official_lengths(forwards))
    blocks = sum(n > 1 for n in forwards)
    assert session.counters == {"steps": len(forwards) - blocks, "blocks": blocks, "fusions": fusions}


def test_single_tokens_fuse_every_buffer_and_one_steps(session: Session) -> None:
    lengths = []
    for token in text(CAPACITY + 1 + 3 * (BUFFER + 1)):
        session.step(token)
        lengths.append(session.live_slots)
    fused = [i for i, (a, b) in enumerate(itertools.pairwise(lengths), start=1) if b < a]
    assert fused == [CAPACITY + k * (BUFFER + 1) for k in range(4)]


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 7, 39, 40, 41, 63, 120, 123])
def test_save_load_clone_are_bit_exact(model: Model, tmp_path: Path, position: int) -> None:
    tail = text(60, seed=1)
    with model.session() as session, model.session() as other:
        session.prefill(text(min(position, 63)))
        for token in text(position)[63:]:
            session.step(token)
        session.save(tmp_path / "state")
        clone = session.clone()
        other.prefill(text(100, seed=9))  # what it held before must not shine through
        other.load(tmp_path / "state")
        assert (clone.position, clone.live_slots) == (session.position, session.live_slots)
        assert (other.position, other.live_slots) == (session.position, session.live_slots)
        np.testing.assert_array_equal(clone.logits(), session.logits())
        np.testing.assert_array_equal(other.logits(), session.logits())
        for token in tail[:20]:
            expected = session.step(token)
            np.testing.assert_array_equal(clone.step(token), expected)
            np.testing.assert_array_equal(other.step(token), expected)
        expected = session.prefill(tail[20:], return_all=True)
        np.testing.assert_array_equal(clone.prefill(tail[20:], return_all=True), expected)
        np.testing.assert_array_equal(other.prefill(tail[20:], return_all=True), expected)
        assert session.state() == clone.state() == other.state()
        clone.close()


def test_state_size_is_constant_and_promised(model: Model, tmp_path: Path) -> None:
    with model.session() as session:
        sizes = {len(session.state())}
        for n in (1, 30, 200):
            session.prefill(text(n))
            session.save(tmp_path / "state")
            sizes |= {len(session.state()), (tmp_path / "state").stat().st_size}
        assert len(sizes) == 1
        assert session.state_bytes == session.model.manifest.state_bytes
        assert 0 < sizes.pop() - session.state_bytes < 256  # the header


def test_memory_is_flat_over_50_000_tokens(plain_bundle: Path) -> None:
    with Session(plain_bundle) as session:
        session.prefill(text(2_000))
        for token in text(2_000):
            session.step(token)
        before = memory_bytes("RssAnon")
        session.prefill(text(30_000))
        for token in text(20_000):
            session.step(token)
        assert session.position == 54_000
        assert memory_bytes("RssAnon") - before < 1_000_000


def test_reset_forgets_everything(session: Session) -> None:
    empty = session.state()
    session.prefill(text(100))
    session.reset()
    assert (session.position, session.live_slots) == (0, 0)
    assert session.state() == empty
    with pytest.raises(InvalidArgumentError, match="empty"):
        session.logits()


def test_state_of_an_empty_session_loads(session: Session) -> None:
    empty = session.state()
    first = session.prefill(text(9))
    session.set_state(empty)
    np.testing.assert_array_equal(session.prefill(text(9)), first)


def test_sessions_share_a_model(model: Model) -> None:
    with model.session() as a, model.session() as b:
        a.prefill(text(50))
        expected = a.step(7)
        b.prefill(text(50))
        np.testing.assert_array_equal(b.step(7), expected)


def test_model_outlives_its_sessions(backend: Backend) -> None:
    model = Model(backend.bundle("session"), **backend.options)
    session = model.session()
    model.close()
    session.prefill([5])  # the last session frees the model
    session.close()
    with pytest.raises(ClosedError):
        model.session()


# --- sampling --------------------------------------------------------------------------------------------------------


def test_greedy_is_arg_max(session: Session) -> None:
    tokens = list(session.generate(text(20), SamplingParams(max_tokens=30, ignore_eos=True)))
    session.reset()
    session.prefill(text(20))
    for token in tokens:
        assert token == int(session.logits().argmax())
        session.step(token)


def test_same_seed_same_tokens(session: Session) -> None:
    def run(seed: int) -> list[int]:
        session.reset()
        params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=seed, max_tokens=40, ignore_eos=True)
        return list(session.generate(text(10), params))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_generation_resumes_from_a_saved_state(session: Session, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True)
    whole = list(session.generate(text(10), params))
    session.reset()
    session.prefill(text(10))
    for token in whole[:7]:
        session.step(token)
    session.save(tmp_path / "state")
    session.reset()
    session.load(tmp_path / "state")
    rest = SamplingParams(temperature=0.8, seed=3, max_tokens=13, ignore_eos=True)
    assert list(session.generate([], rest)) == whole[7:]


def test_eos_ends_generation(session: Session) -> None:
    """The tiny model's own end-of-sequence id, made certain by sampling until it comes."""
    params = SamplingParams(temperature=50.0, seed=0, max_tokens=2000)
    tokens = list(session.generate(text(4), params))
    assert tokens[-1] == 2
    assert 2 not in tokens[:-1]


def test_draws_follow_the_distribution(session: Session) -> None:
    logits = session.prefill(text(30)).astype(np.float64)
    p = np.exp(logits / 0.7 - (logits / 0.7).max())
    p /= p.sum()
    counts = np.zeros(VOCAB)
    draws = 4000
    for seed in range(draws):
        counts[session.sample(SamplingParams(temperature=0.7, seed=seed))] += 1
    big = p * draws >= 5
    chi2 = ((counts - p * draws)[big] ** 2 / (p * draws)[big]).sum()
    freedom = big.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_top_k_and_top_p_cut_the_tail(session: Session) -> None:
    logits = session.prefill(text(30))
    order = np.argsort(-logits)
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p /= p.sum()
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p), 0.5)) + 1].tolist())
    drawn = {session.sample(SamplingParams(temperature=1.0, top_p=0.5, seed=s)) for s in range(500)}
    assert drawn <= nucleus
    assert len(drawn) > len(nucleus) // 2
    drawn = {session.sample(SamplingParams(temperature=5.0, top_k=3, seed=s)) for s in range(200)}
    assert drawn == set(order[:3].tolist())


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.5}, {"top_p": -0.1}],
    ids=str,
)
def test_sampling_parameters_out_of_range(session: Session, bad: dict[str, float]) -> None:
    session.prefill([5])
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        session.sample(SamplingParams(**{"temperature": 1.0, **bad}))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"max_tokens": -1}, {"seed": -1}, {"seed": 2**64}, {"top_k": 1.5}], ids=str)
def test_sampling_parameters_of_the_wrong_kind(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        SamplingParams(**bad)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[5, VOCAB], [-1], [5, 2**31 - 1]])
def test_token_out_of_range_reads_nothing(session: Session, ids: list[int]) -> None:
    session.prefill(text(45))
    before = session.state()
    with pytest.raises(TokenIdError, match=f"{VOCAB - 1}"):
        session.prefill(ids)
    with pytest.raises(TokenIdError):
        session.step(ids[-1])
    assert session.state() == before


def test_ids_of_the_wrong_kind(session: Session) -> None:
    with pytest.raises(EmptyPromptError, match="at least one token"):
        session.prefill([])
    with pytest.raises(InvalidArgumentError, match="integers"):
        session.prefill(np.array([1.5]))
    with pytest.raises(InvalidArgumentError, match="one dimension"):
        session.prefill(np.array([[1, 2]]))
    with pytest.raises(InvalidArgumentError, match="32-bit"):
        session.prefill([2**40])


def test_closed_session(plain_bundle: Path) -> None:
    session = Session(plain_bundle)
    session.close()
    session.close()
    for use in (lambda: session.prefill([5]), session.logits, session.clone, lambda: session.position):
        with pytest.raises(ClosedError):
            use()


def test_onnx_runtime_collects_nothing(plain_bundle: Path, tmp_path: Path) -> None:
    """Since 1.29 it keeps what it reports to its makers in the user's cache folder."""

    def files(name: str, **environment: str) -> list[Path]:
        home = tmp_path / name
        home.mkdir()
        kept = {k: v for k, v in os.environ.items() if k.startswith("LOCOCO_") or k in ("PATH", "PYTHONPATH")}
        command = "import sys; from lococo_runtime import Session; Session(sys.argv[1]).step(5)"
        subprocess.run(
            [sys.executable, "-c", command, plain_bundle], env=kept | {"HOME": str(home)} | environment, check=True
        )
        return [path for path in home.rglob("*") if path.is_file()]

    if not files("asked", ORT_DISABLE_TELEMETRY="0"):
        pytest.skip("this ONNX Runtime collects nothing anyway")
    assert files("silent") == []


def test_two_threads_in_one_session(session: Session) -> None:
    refused, started = [], threading.Event()

    def read() -> None:
        started.set()
        session.prefill(text(20_000))

    thread = threading.Thread(target=read)
    thread.start()
    started.wait()
    while thread.is_alive():
        try:
            session.position  # noqa: B018
        except BusyError as e:
            refused.append(e)
        time.sleep(0.001)  # rarely inside when the other one comes
    thread.join()
    assert refused, "a call from a second thread has to be refused while the first one runs"
    assert session.position == 20_000


def test_cancel_from_another_thread(session: Session) -> None:
    """A prefill of 20,000 blocks ends after the forward it was in; what it read is what any prefill would have."""
    ids = text(20_000 * BLOCK)
    reading = threading.Event()

    def cancel() -> None:
        reading.wait()
        session.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    session.prefill(ids[:BLOCK])
    reading.set()
    with pytest.raises(CancelledError, match="position"):
        session.prefill(ids[BLOCK:])
    thread.join()
    assert session.position % BLOCK == 0
    assert session.position < len(ids)
    with pytest.raises(CancelledError):
        session.step(1)
    session.cancel(False)
    state = session.state()
    read = session.position
    session.reset()
    session.prefill(ids[:read])
    assert session.state() == state


def test_state_of_another_bundle(session: Session, backend: Backend, tmp_path: Path) -> None:
    session.prefill(text(30))
    before = session.state()
    with Session(backend.bundle("stranger"), **backend.options) as other:
        other.prefill(text(5))
        other.save(tmp_path / "state")
    with pytest.raises(StateMismatchError):
        session.load(tmp_path / "state")
    assert session.state() == before


def test_damaged_states(session: Session, tmp_path: Path) -> None:
    session.prefill(text(50))
    good = session.state()
    for cut in (0, 1, 40, len(good) // 2, len(good) - 1):
        (tmp_path / "cut").write_bytes(good[:cut])
        with pytest.raises(CorruptError):
            session.load(tmp_path / "cut")
    (tmp_path / "long").write_bytes(good + b"x")
    with pytest.raises(CorruptError):
        session.load(tmp_path / "long")
    flipped = bytearray(good)
    flipped[-100] ^= 1
    with pytest.raises(CorruptError, match=r"checksum|sha256"):
        session.set_state(bytes(flipped))
    schema = bytearray(good)
    schema[8] += 1
    with pytest.raises(VersionError):
        session.set_state(bytes(schema))
    with pytest.raises(NotFoundError):
        session.load(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):  # without waiting for somebody to write
        with pytest.raises(StorageError, match="regular file"):
            session.load(path)
    for wrong in (None, "state", bytearray(good)):
        with pytest.raises(InvalidArgumentError, match="expected bytes"):
            session.set_state(wrong)  # type: ignore[arg-type]
    assert session.state() == good


def test_save_where_it_cannot_be(session: Session, tmp_path: Path) -> None:
    session.prefill(text(5))
    with pytest.raises((StorageError, NotFoundError)):
        session.save(tmp_path / "no" / "such" / "folder" / "state")
    with pytest.raises(StorageError, match="regular file"):
        session.save("/dev/null")
    (tmp_path / "state").write_bytes(b"old")
    with pytest.raises(StorageError):
        session.save(tmp_path)  # a directory
    for use in (session.save, session.load):
        for wrong in (None, 5, "\ud800", f"{tmp_path / 'new'}\0.state"):  # C would read the path up to the NUL
            with pytest.raises(InvalidArgumentError, match="path"):
                use(wrong)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def damaged(bundle: Path, target: Path) -> Path:
    shutil.copytree(bundle, target)
    return target


def test_bundle_with_a_missing_file(plain_bundle: Path, tmp_path: Path) -> None:
    broken = damaged(plain_bundle, tmp_path / "b")
    (broken / "fusion_1.onnx").unlink()
    with pytest.raises(NotFoundError, match=r"fusion_1\.onnx"):
        Session(broken)
    with pytest.raises(NotFoundError, match="nowhere"):
        Session(tmp_path / "nowhere")


def test_bundle_with_a_truncated_or_changed_file(plain_bundle: Path, tmp_path: Path) -> None:
    broken = damaged(plain_bundle, tmp_path / "b")
    data = (broken / "model.onnx.data").read_bytes()
    (broken / "model.onnx.data").write_bytes(data[:-10])
    with pytest.raises(CorruptError, match=r"model\.onnx\.data"):
        Session(broken)
    (broken / "model.onnx.data").write_bytes(data[:-10] + bytes(10))
    with pytest.raises(CorruptError, match="sha256"):
        Session(broken)
    Session(broken, verify=False).close()


@pytest.mark.parametrize(
    "options",
    [{"num_threads": -1}, {"num_threads": 2**32 + 1}, {"num_threads": "4"}, {"device": None}, {"backend": 5}],
    ids=str,
)
def test_options_of_the_wrong_kind(plain_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        Model(plain_bundle, **options)


def test_a_manifest_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lococo.json")
    with pytest.raises(CorruptError):
        Session(tmp_path)
    (tmp_path / "lococo.json").unlink()
    (tmp_path / "lococo.json").mkdir()
    with pytest.raises(StorageError, match=r"lococo\.json"):
        Session(tmp_path)


def test_bundle_of_another_schema(plain_bundle: Path, tmp_path: Path) -> None:
    broken = damaged(plain_bundle, tmp_path / "b")
    manifest = json.loads((broken / "lococo.json").read_text())
    (broken / "lococo.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(VersionError, match="99"):
        Session(broken)
    (broken / "lococo.json").write_text("{")
    with pytest.raises(CorruptError):
        Session(broken)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "tpu"}, {"backend": "tflite"}], ids=str)
def test_devices_and_backends_that_are_not_there(plain_bundle: Path, options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(options.values()))):
        Session(plain_bundle, **options)  # type: ignore[arg-type]


def test_missing_backend_library(plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((NotFoundError, BackendError), match=r"nothing\.so"):
        Session(plain_bundle, backend_library=tmp_path / "nothing.so")
    monkeypatch.setenv("LOCOCO_ONNXRUNTIME", str(tmp_path / "named.so"))  # before the installed package's
    code = f"from lococo_runtime import Session; Session({str(plain_bundle)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "named.so" in result.stderr


def test_cuda_libraries_of_wheels_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudart.so.13", "cudnn.so.9", "cudnn_ops.so.9", "cufft.so.12"):
        folder = tmp_path / "nvidia" / name[:5] / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(_c_api.library_path(), folder / f"lib{name}")
    (tmp_path / "nvidia" / "cudar" / "lib" / "libcublas.so.13").write_text("not a library")
    monkeypatch.syspath_prepend(tmp_path)
    _c_api.load_cuda_libraries.cache_clear()
    _c_api.load_cuda_libraries()
    mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
    assert {"libcudart.so.13", "libcudnn.so.9"} <= mapped
    assert not {"libcudnn_ops.so.9", "libcufft.so.12", "libcublas.so.13"} & mapped
