"""The TensorRT backend on a GPU: golden answers, windows, states, refusals. scripts/gpu_host makes what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN_NAMES, GPU_BUNDLES, GoldenCase, full_device, unpack_golden
from lococo_runtime import (
    LLM,
    BackendError,
    CancelledError,
    CorruptError,
    DeadSessionError,
    LococoError,
    Model,
    NotFoundError,
    OutOfMemoryError,
    SamplingParams,
    Session,
    UnsupportedError,
    VersionError,
)
from lococo_runtime import _c_api as c

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU_BUNDLES, reason="LOCOCO_GPU_BUNDLES is not set: run scripts/gpu_host, which makes engines"
    ),
]
BUNDLES = Path(GPU_BUNDLES)
RANDOM_NAMES = ["accumulated", "accumulated_fp16", "aging"]
HEADER = 88  # bytes of a state's header
HAS_CPU = importlib.util.find_spec("onnxruntime") is not None or bool(os.environ.get("LOCOCO_ONNXRUNTIME"))
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="no ONNX Runtime: set LOCOCO_ONNXRUNTIME to its library")


@functools.cache
def gpu_model(name: str) -> Model:
    """Opened once; the driver and TensorRT take a while."""
    return Model(BUNDLES / name, device="cuda:0", backend="tensorrt")


@contextlib.contextmanager
def gpu_session(name: str) -> Iterator[Session]:
    with Session(gpu_model(name)) as session:
        yield session


def window_of(session: Session) -> int:
    cache = session.model.manifest.cache
    return cache.capacity - cache.mem_size + 1


def text(session: Session, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, session.model.vocab_size, n)


def at_position(state: bytes, position: int) -> bytes:
    """The same state, further on."""
    changed = bytearray(state)
    changed[HEADER : HEADER + 8] = struct.pack("<q", position)
    return resealed(changed)


def resealed(state: bytearray) -> bytes:
    state[56:88] = hashlib.sha256(state[:56] + state[HEADER:]).digest()
    return bytes(state)


def generate_until(session: Session, max_tokens: int, stop_at: int) -> list[int]:
    """lococo_session_generate, stopped by its callback at the token of index `stop_at`."""
    tokens: list[int] = []

    def collect(token: int, _: object) -> int:
        tokens.append(token)
        return int(len(tokens) == stop_at + 1)

    params = SamplingParams().to_c()
    c.call("lococo_session_generate", session._handle, ctypes.byref(params), max_tokens, c.TokenFn(collect), None, None)
    return tokens


def step_until(session: Session, max_tokens: int, stop_at: int) -> list[int]:
    """The same by single steps, argmax on the host."""
    tokens: list[int] = []
    stops = session.model.manifest.model.eos_token_ids
    while len(tokens) < max_tokens:
        tokens.append(session.sample())
        if len(tokens) == max_tokens or len(tokens) == stop_at + 1 or tokens[-1] in stops:
            break
        session.step(tokens[-1])
    return tokens


# --- golden ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    return unpack_golden(request.param, tmp_path_factory.mktemp("golden") / request.param)


def test_golden_logits_and_greedy_tokens(case: GoldenCase) -> None:
    next_ids = [*case.io["decode_input_ids"][0].tolist(), int(case.io["decode_next_id_after_last"][0])]
    with gpu_session(case.name) as session:
        logits = session.prefill(case.io["input_ids"][0], return_all=True)
        np.testing.assert_allclose(logits, case.io["prefill_logits"][0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(session.logits(), logits[-1], rtol=0, atol=1e-4)
        worst = 0.0
        for step, expected in enumerate(case.io["decode_logits"][0]):
            assert session.sample() == next_ids[step]
            out = session.step(next_ids[step])
            worst = max(worst, float(np.abs(out - expected).max()))
        assert session.sample() == next_ids[-1]
        print(f"{case.name}: worst logit error {worst:.2e}")
        assert worst <= 1e-3


def test_tensorrts_own_kernels_and_ours_agree(tmp_path: Path) -> None:
    case = unpack_golden(GOLDEN_NAMES[0], tmp_path)
    ids = case.io["input_ids"][0]
    with gpu_session(case.name) as ours, gpu_session("own_kernels") as theirs:
        np.testing.assert_allclose(ours.prefill(ids), theirs.prefill(ids), rtol=0, atol=1e-4)
        tokens = ours.generate_all([], SamplingParams(max_tokens=60))
        assert theirs.generate_all([], SamplingParams(max_tokens=60)) == tokens
        np.testing.assert_allclose(ours.logits(), theirs.logits(), rtol=0, atol=1e-3)
        theirs.set_state(ours.state())
        assert theirs.state() == ours.state()


def test_golden_tokens_in_windows(case: GoldenCase) -> None:
    next_ids = [*case.io["decode_input_ids"][0].tolist(), int(case.io["decode_next_id_after_last"][0])]
    with gpu_session(case.name) as session:
        params = SamplingParams(max_tokens=len(next_ids), ignore_eos=True)
        assert session.generate_all(case.io["input_ids"][0], params) == next_ids


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GOLDEN_NAMES, *RANDOM_NAMES, "batch-lococo-mha-no-buffer"])  # a window of one
def test_windows_equal_single_steps(name: str) -> None:
    with gpu_session(name) as session, gpu_session(name) as single:
        window, cache = window_of(session), session.model.manifest.cache
        prompts = [1, cache.mem_size, cache.capacity, cache.capacity + 1, 3 * cache.block_size + 5]
        for prompt in prompts:
            for max_tokens in (window, window + 1, window + 2, 5 * window + 3):
                session.reset()
                single.reset()
                session.prefill(text(session, prompt))
                single.prefill(text(session, prompt))
                got = session.generate_all([], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
                expected = list(single.generate([], SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
                assert got == expected
                assert session.state() == single.state()  # to the bit
                assert session.counters == single.counters


@pytest.mark.parametrize("name", ["c1_baseline", *RANDOM_NAMES])
def test_stop_inside_a_window(name: str) -> None:
    with gpu_session(name) as session, gpu_session(name) as single:
        window, cache = window_of(session), session.model.manifest.cache
        session.prefill(text(session, 4 * cache.block_size))
        fused = session.state()
        assert session.live_slots == cache.mem_size
        for stop_at in range(2 * window + 2):
            session.set_state(fused)
            single.set_state(fused)
            assert generate_until(session, 4 * window, stop_at) == step_until(single, 4 * window, stop_at)
            assert session.state() == single.state()
            np.testing.assert_array_equal(session.logits(), single.logits())


def test_cancel_inside_a_window() -> None:
    """What was shown before the cancel is read, but for the last token: as between single steps."""
    with gpu_session("accumulated") as session, gpu_session("accumulated") as single:
        session.prefill(text(session, 4 * session.model.manifest.cache.block_size))
        fused = session.state()
        for cancel_at in range(2 * window_of(session) + 2):
            session.set_state(fused)
            single.set_state(fused)
            tokens: list[int] = []

            def collect(token: int, _: object) -> int:
                tokens.append(token)  # noqa: B023
                session.cancel(len(tokens) == cancel_at + 1)  # noqa: B023
                return 0

            params = SamplingParams(ignore_eos=True).to_c()
            with pytest.raises(CancelledError):
                c.call(
                    "lococo_session_generate",
                    session._handle,
                    ctypes.byref(params),
                    200,
                    c.TokenFn(collect),
                    None,
                    None,
                )
            session.cancel(False)
            assert len(tokens) == cancel_at + 1
            for token in tokens[:-1]:
                single.step(token)
            assert session.state() == single.state()


@pytest.mark.parametrize("position", [1_048_576, 2**31 - 200])
def test_far_positions(position: int) -> None:
    with gpu_session("c5_rope4") as session, gpu_session("c5_rope4") as single:
        session.prefill(text(session, 200))
        state = at_position(session.state(), position)
        session.set_state(state)
        single.set_state(state)
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        assert session.generate_all([], params) == list(single.generate([], params))
        assert session.position == position + 99
        assert session.state() == single.state()


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c1_baseline", *RANDOM_NAMES])
@pytest.mark.parametrize("prompt", [1, 31, 47, 100])
def test_save_load_clone_are_bit_exact(name: str, prompt: int, tmp_path: Path) -> None:
    with gpu_session(name) as session, gpu_session(name) as other:
        session.prefill(text(session, prompt))
        session.save(tmp_path / "state")
        other.prefill(text(session, 90, seed=9))  # what it held before must not shine through
        other.load(tmp_path / "state")
        clone = session.clone()
        tail = text(session, 130, seed=1)
        for each in (session, other, clone):
            each.prefill(tail[:77])
            for token in tail[77:]:
                each.step(int(token))
        assert session.state() == other.state() == clone.state()
        clone.close()


def test_reset_forgets_everything() -> None:
    with gpu_session("accumulated") as session:
        empty = session.state()
        session.prefill(text(session, 200))
        session.reset()
        assert session.state() == empty


@needs_cpu
@pytest.mark.parametrize("name", [*GOLDEN_NAMES, "accumulated"])
def test_a_state_moves_between_cpu_and_gpu(name: str, tmp_path: Path) -> None:
    """Read on one, saved, loaded on the other, continued on both: the same tokens, logits and states."""
    with gpu_session(name) as gpu, Session(BUNDLES / name) as cpu:
        for start, goes_on in ((cpu, gpu), (gpu, cpu)):
            start.reset()
            start.prefill(text(start, 107))
            start.save(tmp_path / "state")
            goes_on.load(tmp_path / "state")
            np.testing.assert_array_equal(start.logits(), goes_on.logits())
            for _ in range(60):
                token = start.sample()
                assert goes_on.sample() == token
                np.testing.assert_allclose(goes_on.step(token), start.step(token), rtol=0, atol=1e-3)
            assert (start.position, start.live_slots) == (goes_on.position, goes_on.live_slots)
            ours, theirs = (np.frombuffer(s.state()[HEADER + 16 :], np.float32) for s in (start, goes_on))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


# --- the same as on the CPU ------------------------------------------------------------------------------------------

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "typical": {"temperature": 1.2, "min_p": 0.02, "typical_p": 0.95},
    "penalised": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {7: 2.0}},
}


@needs_cpu
@pytest.mark.parametrize("changes", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("name", [*GOLDEN_NAMES, "accumulated"])
def test_a_seed_gives_the_same_tokens_on_both(name: str, changes: dict[str, Any]) -> None:
    """Each generates by itself, through several fusions."""
    with gpu_session(name) as gpu, Session(BUNDLES / name) as cpu:
        prompt = text(gpu, 50)
        for seed in range(3):
            params = SamplingParams(
                **{"temperature": 1.0, "seed": seed, "max_tokens": 60, "ignore_eos": True, **changes}
            )
            gpu.reset()
            cpu.reset()
            assert gpu.generate_all(prompt, params) == cpu.generate_all(prompt, params)
            assert gpu.counters == cpu.counters
            assert gpu.counters["fusions"] > 1


@needs_cpu
def test_a_seed_gives_the_same_text_on_both() -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    with LLM(BUNDLES / "text", device="cuda:0", backend="tensorrt") as gpu, LLM(BUNDLES / "text") as cpu:
        for seed in range(5):
            params = SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=80, stop=["zq"], logprobs=2)
            ours, theirs = gpu.chat(messages, params), cpu.chat(messages, params)
            assert (ours.text, ours.token_ids, ours.stop_reason) == (theirs.text, theirs.token_ids, theirs.stop_reason)
            for one, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert list(one.top) == list(other.top)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_a_c_program_runs_on_the_gpu(tmp_path: Path) -> None:
    root, library, program = Path(__file__).parents[1], c.library_path(), tmp_path / "generate"
    link = [library, f"-Wl,-rpath,{library.parent}"]
    source = root / "examples" / "c" / "generate.c"
    subprocess.run(["cc", "-std=c11", source, f"-I{root / 'runtime' / 'include'}", *link, "-o", program], check=True)
    environment = {**os.environ, "LOCOCO_DEVICE": "cuda:0", "LOCOCO_BACKEND": "tensorrt"}
    command = [program, BUNDLES / "c1_baseline", "60", "5", "6", "7"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    with gpu_session("c1_baseline") as session:
        tokens = session.generate_all([5, 6, 7], SamplingParams(max_tokens=60))
        assert out.splitlines()[0].split() == ["tokens", *map(str, tokens)]


# --- threads, memory -------------------------------------------------------------------------------------------------


def test_sessions_in_threads() -> None:
    name = "accumulated"
    with gpu_session(name) as session:
        expected = session.generate_all(text(session, 150), SamplingParams(max_tokens=90, ignore_eos=True))
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        with gpu_session(name) as session:  # captures its graphs while the others run theirs
            params = SamplingParams(max_tokens=90, ignore_eos=True)
            results[index] = session.generate_all(text(session, 150), params)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), expected)


def test_device_memory_is_flat_to_the_byte() -> None:
    torch = pytest.importorskip("torch", reason="torch is missing: it asks for the device's free memory")
    with gpu_session("c1_baseline") as session:

        def work(blocks: int, windows: int) -> None:
            session.prefill(text(session, blocks * 32 + 1))
            session.generate_all([], SamplingParams(max_tokens=windows * window_of(session), ignore_eos=True))
            session.prefill(text(session, 40), return_all=True)

        work(5, 5)
        before = torch.cuda.mem_get_info()[0]
        work(1000, 100)
        session.set_state(at_position(session.state(), 1_048_576))
        work(100, 10)
        assert torch.cuda.mem_get_info()[0] == before


def test_a_model_that_does_not_fit_is_refused() -> None:
    with full_device(), pytest.raises(OutOfMemoryError, match=r"needs [0-9]+ bytes, [0-9]+ of [0-9]+ are free"):
        Model(BUNDLES / "wide", device="cuda:0", backend="tensorrt")
    with Session(BUNDLES / "wide", device="cuda:0", backend="tensorrt") as session:
        assert session.prefill([5, 6, 7]).shape == (60000,)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_unsound_logits_kill_the_session() -> None:
    with gpu_session("c1_baseline") as session:
        cache = session.model.manifest.cache
        session.prefill(text(session, 3 * cache.block_size))  # a fusion was the last thing: a window comes next
        assert session.live_slots == cache.mem_size
        sound = session.state()
        for value in (np.nan, np.inf):
            state = bytearray(sound)
            state[HEADER + 16 + 4 : HEADER + 16 + 8] = np.float32(value).tobytes()
            session.set_state(resealed(state))
            with pytest.raises(BackendError, match="NaN or infinity"):
                session.generate_all([], SamplingParams(max_tokens=60))
            with pytest.raises(DeadSessionError):
                session.step(5)
        session.set_state(sound)
        session.step(5)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    target = tmp_path / "bundle"
    shutil.copytree(BUNDLES / "c1_baseline", target)
    return target


def engines_of(bundle: Path) -> Path:
    (directory,) = (p.parent for p in (bundle / "engines").glob("*/engines.json"))
    return directory


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = engines_of(bundle) / "engines.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def truncate(bundle: Path) -> None:
    plan = engines_of(bundle) / "decoder_1.plan"
    plan.write_bytes(plan.read_bytes()[:-1000])


def flip(bundle: Path) -> None:
    plan = engines_of(bundle) / "decoder_1.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)


def forge_header(bundle: Path) -> None:
    """A plan that says another version, with its new sha256 in engines.json."""
    plan = engines_of(bundle) / "decoder_1.plan"
    data = bytearray(plan.read_bytes())
    data[24:28] = bytes((10, 3, 0, 26))
    plan.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(bundle, lambda d: d["plans"][[p["name"] for p in d["plans"]].index("decoder_1")].update(sha256=digest))


def replace_plan(bundle: Path) -> None:
    """Another graph's plan under this one's name, sizes and digests in order: only its tensors give it away."""
    directory = engines_of(bundle)

    def change(d: dict[str, Any]) -> None:
        plans = {p["name"]: p for p in d["plans"]}
        plans["decoder_1"].update({k: plans["fusion_1"][k] for k in ("plan", "nbytes", "sha256")})

    assert (directory / "fusion_1.plan").exists()
    edit(bundle, change)


REFUSALS: dict[str, tuple[Callable[[Path], None], type[LococoError], str]] = {
    "truncated plan": (truncate, CorruptError, r"decoder_1\.plan.*cut short"),
    "changed plan": (flip, CorruptError, r"decoder_1\.plan.*sha256"),
    "forged header": (forge_header, VersionError, r"decoder_1\.plan.*header"),
    "another graph": (replace_plan, CorruptError, r"decoder_1"),
    "missing plan": (lambda b: (engines_of(b) / "fusion_1.plan").unlink(), NotFoundError, r"fusion_1\.plan"),
    "another version": (lambda b: edit(b, lambda d: d.update(tensorrt_version="7.9.9")), VersionError, r"7\.9\.9"),
    "another SM": (lambda b: edit(b, lambda d: d.update(sm=[53])), UnsupportedError, r"built for sm53"),
    "another bundle": (
        lambda b: edit(b, lambda d: d.update(bundle_id="0" * 64)),
        CorruptError,
        r"built for bundle 000",
    ),
    "no engines": (lambda b: shutil.rmtree(b / "engines"), NotFoundError, r"lococo-build"),
    "not JSON": (lambda b: (engines_of(b) / "engines.json").write_text("{"), CorruptError, r"engines"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(copy: Path, what: str) -> None:
    change, error, message = REFUSALS[what]
    change(copy)
    with pytest.raises(error, match=f"(?s){message}"):
        Session(copy, device="cuda:0", backend="tensorrt")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(UnsupportedError, match="cuda:99"):
        Session(BUNDLES / "c1_baseline", device="cuda:99", backend="tensorrt")
    with pytest.raises(NotFoundError, match=r"nothing\.so"):
        Session(BUNDLES / "c1_baseline", device="cuda:0", backend="tensorrt", backend_library="nothing.so")
