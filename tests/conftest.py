"""Fixtures shared by the tests: the golden cases, unpacked, and the backends that tests run on."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import lzma
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lococo_runtime import _c_api

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of the onnxruntime that some tests import
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: what tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(p.name for p in GOLDEN.iterdir() if (p / "args.json").exists())


@dataclass(frozen=True)
class GoldenCase:
    """A recorded run: a checkpoint directory in the merged format, its hyper-parameters, and every array (io.npz)."""

    name: str
    path: Path
    args: dict[str, Any]
    io: dict[str, np.ndarray]

    @property
    def load_args(self) -> dict[str, Any]:
        """Keyword arguments of `load_checkpoint`."""
        names = ("mem_size", "hh_keep_rate", "local_len", "block_size", "buffer")
        return {"activation": self.args["hidden_act"], **{n: self.args[n] for n in names}}

    @property
    def saturated(self) -> bool:
        """The mixing softmax is close to one-hot, which amplifies rounding: wider tolerances."""
        return bool(self.args["conv_gain"] >= 4)

    @property
    def chunk_lens(self) -> list[int]:
        return [int(n) for n in self.io["chunk_lens"]]


def _read(path: Path) -> bytes:
    """A file, or its .xz beside where it would be."""
    return path.read_bytes() if path.exists() else lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes())


def unpack_golden(name: str, target: Path) -> GoldenCase:
    """Unpacks case `name` into the directory `target`, which becomes a checkpoint directory."""
    source = GOLDEN / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    (target / "model.safetensors").write_bytes(_read(source / "model.safetensors"))
    with np.load(io.BytesIO(_read(source / "io.npz"))) as arrays:
        return GoldenCase(name, target, json.loads((source / "args.json").read_text()), dict(arrays))


@pytest.fixture(scope="session", params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    """Every golden case in turn; read-only, shared by the session."""
    return unpack_golden(request.param, tmp_path_factory.mktemp("golden") / request.param)


GPU_BUNDLES = os.environ.get("LOCOCO_GPU_BUNDLES", "")
"""The bundles of bundles.EXPORTS with engines, made by scripts/gpu_host. Without it no test runs on a GPU."""


@dataclass(frozen=True)
class Backend:
    """Where a test runs: `options` of Model, Session and LLM, and bundles for it."""

    name: str
    options: dict[str, str]
    folder: Path

    @property
    def flags(self) -> list[str]:
        """Of the commands."""
        return [part for name, value in self.options.items() for part in (f"--{name}", value)]

    def bundle(self, name: str) -> Path:
        """One of bundles.EXPORTS; read-only."""
        from bundles import EXPORTS  # imports torch

        path = self.folder / name
        return path if path.exists() else EXPORTS[name](path)


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """ONNX Runtime."""
    return Backend("onnxruntime", {}, tmp_path_factory.mktemp("bundles"))


def has_driver() -> bool:
    """Whether there is an NVIDIA driver here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def has_cuda_provider() -> bool:
    """Whether the ONNX Runtime that tests use is one for GPUs."""
    library = os.environ.get("LOCOCO_ONNXRUNTIME") or _c_api.find_onnxruntime()
    return library is not None and Path(library).with_name("libonnxruntime_providers_cuda.so").exists()


@contextlib.contextmanager
def full_device() -> Iterator[None]:
    """At most 100 MiB of the GPU are free meanwhile. Skips the test without torch."""
    torch = pytest.importorskip("torch", reason="torch is missing: it fills the device")
    torch.cuda.init()
    hog: list[Any] = []
    try:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while torch.cuda.mem_get_info()[0] > 100 << 20:
                size = max(torch.cuda.mem_get_info()[0] // 2, 64 << 20)
                hog.append(torch.empty(min(size, 16 << 30), dtype=torch.uint8, device="cuda"))
        yield
    finally:
        hog.clear()
        torch.cuda.empty_cache()


CUDA = {"device": "cuda:0", "backend": "onnxruntime"}
TENSORRT = {"device": "cuda:0", "backend": "tensorrt"}
GPU_BACKENDS = {"onnxruntime-cuda": CUDA, "tensorrt": TENSORRT} if has_cuda_provider() else {"tensorrt": TENSORRT}


@pytest.fixture(
    scope="module",
    params=["onnxruntime", *(pytest.param(b, marks=pytest.mark.gpu) for b in GPU_BACKENDS if GPU_BUNDLES)],
)
def backend(request: pytest.FixtureRequest, cpu: Backend) -> Backend:
    """Every backend in turn: what a test of it asserts holds on all."""
    if request.param == "onnxruntime":
        return cpu
    return Backend(request.param, GPU_BACKENDS[request.param], Path(GPU_BUNDLES))
