"""Many sessions on one model: parked, resumed, started from packs, and every refusal."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Backend
from lococo_runtime import (
    BusyError,
    CancelledError,
    ClosedError,
    CorruptError,
    InvalidArgumentError,
    Model,
    NoSpaceError,
    NotFoundError,
    PoolFullError,
    SamplingParams,
    Session,
    SessionPool,
    StateMismatchError,
    VersionError,
)
from lococo_runtime._process import memory_bytes
from test_session import BLOCK, CAPACITY, text

GREEDY = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    return cpu.bundle("session")


@pytest.fixture(scope="module")
def model(backend: Backend) -> Iterator[Model]:
    with Model(backend.bundle("session"), **backend.options) as m:
        yield m


@pytest.fixture(scope="module")
def stranger(backend: Backend) -> Iterator[Model]:
    """A model of the same shapes and other weights."""
    with Model(backend.bundle("stranger"), **backend.options) as m:
        yield m


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a thousand fsyncs take a disk many seconds."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def turn(i: int, n: int) -> list[int]:
    """What session i reads in its turn n: a token, or every fourth time up to 61, enough for a fusion."""
    return text((7 * i + 3 * n) % 61 + 1 if (i + n) % 4 == 0 else 1, seed=1000 * n + i)


# --- parking ---------------------------------------------------------------------------------------------------------


def test_a_thousand_sessions_in_the_memory_of_ten(model: Model, fast: Path) -> None:
    """Every session speaks twice and is parked in between; it says what it says uninterrupted."""
    count = 1000
    said: dict[int, list[int]] = {i: [] for i in range(count)}
    with SessionPool(model, fast / "pool", budget_bytes=10 * model.session_bytes) as pool:
        for n, i in itertools.product(range(2), range(count)):
            with pool.acquire(f"chat {i}") as session:
                said[i] += session.generate_all(turn(i, n), GREEDY)
        info = pool.info()
        assert (info.max_sessions, info.memory_bytes) == (10, 10 * model.session_bytes)
        assert (info.num_acquired, info.num_idle, info.num_parked) == (0, 10, 990)
        assert (info.parks, info.resumes) == (1990, 1000)
    with model.session() as session:
        for i in range(count):
            session.reset()
            alone = [token for n in range(2) for token in session.generate_all(turn(i, n), GREEDY)]
            assert said[i] == alone
    assert len(set(map(tuple, said.values()))) > count // 2


def test_memory_does_not_grow_with_the_number_of_sessions(bundle: Path, fast: Path) -> None:
    with Model(bundle) as model, SessionPool(model, fast / "pool", max_sessions=2) as pool:
        for i in range(100):
            pool.acquire(f"{i}").close()
        before = memory_bytes("RssAnon")
        for i in range(100, 600):
            pool.acquire(f"{i}").close()
        assert memory_bytes("RssAnon") - before < 20 * model.session_bytes


def test_a_new_pool_goes_on_where_the_old_one_was(model: Model, tmp_path: Path) -> None:
    names = ["a/b", "../up", "ünïcode 漢字 🙂", "A", "a", ".", "con", "x" * 200, "new\nline", "%41"]
    states = {}
    with SessionPool(model, tmp_path / "pool", max_sessions=3) as pool:
        for i, name in enumerate(names):
            with pool.acquire(name) as session:
                session.prefill(text(5 + i, seed=i))
                states[name] = session.state()
    assert {p.parent for p in tmp_path.rglob("*") if p.is_file()} == {tmp_path / "pool"}
    with SessionPool(model, tmp_path / "pool", max_sessions=3) as pool:
        assert set(pool.sessions()) == set(names)
        assert set(pool.sessions().values()) == {"disk"}
        for name in names:
            with pool.acquire(name) as session:
                assert session.id == name
                assert session.state() == states[name]
        assert list(pool.sessions()) == names  # least recently used first
        assert list(pool.sessions().values()) == ["disk"] * 7 + ["memory"] * 3


KILLED = """
import json, sys
from lococo_runtime import Model, SessionPool
with Model(sys.argv[1], **json.loads(sys.argv[3])) as model:
    pool = SessionPool(model, sys.argv[2], max_sessions=2)
    for i in range(1, 100):
        for name in ("parked", "flushed", "lost"):
            with pool.acquire(name) as session:
                session.prefill([5] * i)
            if name == "flushed":
                pool.flush(name)
        print(i, flush=True)
        for name in "xy":
            pool.acquire(name).close()
"""


def test_kill_loses_no_parked_session(backend: Backend, model: Model, tmp_path: Path) -> None:
    arguments = [str(backend.bundle("session")), str(tmp_path / "pool"), json.dumps(backend.options)]
    command = [sys.executable, "-c", KILLED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout
        for line in child.stdout:
            if int(line) == 12:
                child.send_signal(signal.SIGKILL)
                break
        rounds = max([12, *map(int, child.stdout.read().split())])
    (tmp_path / "pool" / "parked.state.1-2.tmp").write_bytes(b"half")  # what a kill inside a write leaves
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        assert not list((tmp_path / "pool").glob("*.tmp"))
        positions = [n * (n + 1) // 2 for n in range(rounds + 2)]
        for name in ("parked", "flushed"):
            with pool.acquire(name) as session:
                assert session.position in positions[rounds - (name == "parked") :]
                with model.session() as alone:
                    for n in range(1, positions.index(session.position) + 1):
                        alone.prefill([5] * n)
                    assert session.state() == alone.state()


# --- memory packs ----------------------------------------------------------------------------------------------------


def test_a_hundred_sessions_from_one_pack(model: Model, fast: Path) -> None:
    """A document read once, whose state starts any number of sessions: the same tokens as reading it again."""
    document = text(20 * BLOCK + 3)
    pack = fast / "document.lococo"
    with model.session() as session:
        session.prefill(document)
        session.save(pack)
    assert pack.stat().st_size < 1.1 * model.state_bytes
    with SessionPool(model, fast / "pool", max_sessions=8) as pool:
        said = {}
        for i in range(100):
            with pool.acquire(f"{i}", start=pack) as session:
                assert session.position == len(document)
                said[i] = session.generate_all(turn(i, 0), GREEDY)
        for i in range(100):  # known now: the pack is not read again
            with pool.acquire(f"{i}", start=fast / "nowhere") as session:
                assert session.position > len(document)
                said[i] += session.generate_all(turn(i, 1), GREEDY)
    for i in range(100):
        with model.session() as session:
            session.prefill(document)
            assert said[i] == session.generate_all(turn(i, 0), GREEDY) + session.generate_all(turn(i, 1), GREEDY)


def test_packs_have_one_size(model: Model, tmp_path: Path) -> None:
    sizes = set()
    with model.session() as session:
        for n in (1, BLOCK, CAPACITY + 1, 5000):
            session.prefill(text(n))
            session.save(tmp_path / "pack")
            sizes.add((tmp_path / "pack").stat().st_size)
    assert sizes == {model.state_bytes + 88}


def test_soak(bundle: Path, tmp_path: Path) -> None:
    """A short run of scripts/soak.py. Time is not judged."""
    script = Path(__file__).parent.parent / "scripts" / "soak.py"
    options = ["--tokens", "20000", "--windows", "5", "--time-ratio", "1000"]
    command = [sys.executable, str(script), str(bundle), str(tmp_path / "soak.json"), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "soak.json").read_text())
    assert (report["tokens"], report["finite"], report["resumed"]) == (20_000, True, True)
    assert len(report["state_bytes"]) == 1
    assert report["grown_bytes"] < 1 << 20
    assert [w["position"] for w in report["windows"]] == [4000, 8000, 12_000, 16_000, 20_000]


# --- threads ---------------------------------------------------------------------------------------------------------


def test_many_threads(model: Model, fast: Path) -> None:
    """Eight threads speak for forty sessions in the memory of five."""
    turns = 4
    with SessionPool(model, fast / "pool", max_sessions=5) as pool:

        def speak(i: int) -> list[int]:
            said = []
            for n in range(turns):
                with pool.acquire(f"{i}", timeout=None) as session:
                    said += session.generate_all(turn(i, n), GREEDY)
            return said

        with ThreadPoolExecutor(8) as threads:
            said = list(threads.map(speak, range(40)))
    with model.session() as session:
        for i in range(40):
            session.reset()
            assert said[i] == [t for n in range(turns) for t in session.generate_all(turn(i, n), GREEDY)]


def test_a_session_belongs_to_one_thread(model: Model, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=2) as pool:
        session = pool.acquire("a")
        with pytest.raises(BusyError, match='"a"'):
            pool.acquire("a")
        with pytest.raises(BusyError, match="release"):
            pool.remove("a")
        with pytest.raises(BusyError, match="release"):
            pool.flush("a")
        with pytest.raises(BusyError, match="1 sessions are acquired"):
            pool.close()

        started = threading.Event()

        def read() -> None:
            started.set()
            session.prefill(text(20_000))

        thread = threading.Thread(target=read)
        thread.start()
        started.wait()
        refused = 0
        while thread.is_alive():
            try:
                _ = session.position
                time.sleep(0.001)  # rarely inside when the other one comes
            except BusyError:
                refused += 1
                with pytest.raises(BusyError, match="another thread"):
                    pool.release(session)
                break
        thread.join()
        assert refused
        assert session.position == 20_000
        session.close()
        with pytest.raises(ClosedError):
            session.logits()
        session.close()


def test_waiting_for_a_session(model: Model, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        session = pool.acquire("a")
        with pytest.raises(PoolFullError, match="all 1 sessions"):
            pool.acquire("b", timeout=0.01)
        assert "b" not in pool
        timer = threading.Timer(0.02, session.close)
        timer.start()
        pool.acquire("b", timeout=None).close()
        timer.join()
        assert pool.sessions() == {"a": "disk", "b": "memory"}


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_while_parking(model: Model, small_disk: Path) -> None:
    states: dict[str, bytes] = {}
    pool = SessionPool(model, small_disk / "pool", max_sessions=2)

    def fill() -> None:
        for i in range(1_000):
            with pool.acquire(f"{i}") as session:
                session.prefill(text(3 + i % 50, seed=i))
                states[f"{i}"] = session.state()

    with pytest.raises(NoSpaceError, match=r"\.state"):
        fill()
    assert set(pool.sessions()) == set(states)
    assert list(pool.sessions().values()).count("memory") == 2
    last = list(states)[-1]
    with pool.acquire(last) as session:  # what is in memory goes on
        session.prefill(text(9))
        states[last] = session.state()
    with pytest.raises(NoSpaceError):
        pool.acquire("0")
    with pytest.raises(NoSpaceError):
        pool.close()  # still open
    kept = list(states)[3:]
    for name in list(states)[:3]:  # room for two parked more, and for one to be written beside its old file
        pool.remove(name)
    for name in kept:
        with pool.acquire(name) as session:
            assert session.state() == states[name]
    pool.close()
    with SessionPool(model, small_disk / "pool", max_sessions=2) as pool:
        assert set(pool.sessions()) == set(kept)


def test_state_files_that_are_not_ours(model: Model, stranger: Model, tmp_path: Path) -> None:
    with SessionPool(stranger, tmp_path / "pool", max_sessions=1) as pool, pool.acquire("foreign") as session:
        session.prefill(text(5))
        session.save(tmp_path / "pack")
    good = session.model.session().state()
    newer = bytearray(good)
    newer[8] += 1
    (tmp_path / "pool" / "newer.state").write_bytes(newer)
    (tmp_path / "pool" / "cut.state").write_bytes(good[:-1])
    (tmp_path / "pool" / "notes.txt").write_text("not a session")
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        assert set(pool.sessions()) == {"foreign", "newer", "cut"}
        for name, error in (("foreign", StateMismatchError), ("newer", VersionError), ("cut", StateMismatchError)):
            with pytest.raises(error, match=rf"{name}\.state"):
                pool.acquire(name)
            assert name in pool
        with pytest.raises(StateMismatchError, match="pack"):
            pool.acquire("fresh", start=tmp_path / "pack")
        with pytest.raises(NotFoundError, match="nowhere"):
            pool.acquire("fresh", start=tmp_path / "nowhere")
        (tmp_path / "empty").touch()
        with pytest.raises(CorruptError, match="empty"):
            pool.acquire("fresh", start=tmp_path / "empty")
        assert "fresh" not in pool
        pool.remove("foreign")
        with pool.acquire("foreign") as session:
            assert session.position == 0
    assert (tmp_path / "pool" / "notes.txt").exists()


def test_pools_that_cannot_be(model: Model, tmp_path: Path) -> None:
    for options in ({}, {"budget_bytes": 1 << 30, "max_sessions": 1}):
        with pytest.raises(InvalidArgumentError, match="one of budget_bytes and max_sessions"):
            SessionPool(model, tmp_path / "pool", **options)
    for options in ({"budget_bytes": 0}, {"max_sessions": -1}, {"max_sessions": 1.5}, {"max_sessions": True}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            SessionPool(model, tmp_path / "pool", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=f"at least {model.session_bytes}"):
        SessionPool(model, tmp_path / "pool", budget_bytes=model.session_bytes - 1)
    with pytest.raises(NotFoundError, match="nowhere"):
        SessionPool(model, tmp_path / "nowhere" / "pool", max_sessions=1)
    with SessionPool(model, tmp_path / "pool", max_sessions=1), pytest.raises(BusyError, match="another pool"):
        SessionPool(model, tmp_path / "pool", max_sessions=1)
    SessionPool(model, tmp_path / "pool", max_sessions=1).close()


def test_ids_and_sessions_that_cannot_be(model: Model, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool, Session(model) as own:
        for wrong in ("", "x" * 201, "漢" * 70, "a\0b", "\ud800", None, 5):
            with pytest.raises(InvalidArgumentError, match="id"):
                pool.acquire(wrong)  # type: ignore[arg-type]
        for seconds in (-1, float("nan"), float("inf"), "1"):
            with pytest.raises(InvalidArgumentError, match="timeout"):
                pool.acquire("a", timeout=seconds)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="NUL"):
            pool.acquire("a", start=f"{tmp_path}\0")
        with pytest.raises(InvalidArgumentError, match="this pool"):
            pool.release(own)  # type: ignore[arg-type]
        for call in (pool.remove, pool.flush):
            with pytest.raises(NotFoundError, match='"a"'):
                call("a")
    pool.close()
    with pytest.raises(ClosedError):
        pool.acquire("a")


def test_clone_of_a_pooled_session_is_its_own(model: Model, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        with pool.acquire("a") as session:
            session.prefill(text(7))
            clone = session.clone()
            expected = session.state()
        assert clone.state() == expected
        clone.close()
        assert pool.info().num_acquired == 0


def test_a_cancelled_session_comes_back_fresh(model: Model, tmp_path: Path) -> None:
    with SessionPool(model, tmp_path / "pool", max_sessions=1) as pool:
        with pool.acquire("a") as session:
            session.prefill(text(3))
            session.cancel()
            with pytest.raises(CancelledError):
                session.step(5)
        for name in ("a", "b"):
            with pool.acquire(name) as session:
                session.step(5)
        with pool.acquire("a") as session:
            assert session.position == 4


def test_the_pool_outlives_its_model(backend: Backend, tmp_path: Path) -> None:
    model = Model(backend.bundle("session"), **backend.options)
    pool = SessionPool(model, tmp_path / "pool", max_sessions=1)
    model.close()
    with pool.acquire("a") as session:
        session.prefill(text(7))
    pool.close()
    with pytest.raises(ClosedError):
        SessionPool(model, tmp_path / "pool", max_sessions=1)
