"""The TensorRT backend on a machine without a GPU says so, and what to do."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from conftest import Backend
from lococo_runtime import Session, UnsupportedError


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    return cpu.bundle("c1_baseline")


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_no_driver(bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"expected an NVIDIA GPU with its driver.*libcuda\.so\.1"):
        Session(bundle, device="cuda:0", backend="tensorrt")


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:x"])
def test_devices_that_tensorrt_does_not_run_on(bundle: Path, device: str) -> None:
    with pytest.raises(UnsupportedError, match=f'expects "cuda:0".*"{device}"'):
        Session(bundle, device=device, backend="tensorrt")


def test_onnxruntime_stays_on_the_cpu(bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cuda:0.*tensorrt"):
        Session(bundle, device="cuda:0")
