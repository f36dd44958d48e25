"""The GPU backends on a machine without a GPU say so, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Backend, has_driver
from lococo_runtime import Session, UnsupportedError


@pytest.fixture(scope="module")
def bundle(cpu: Backend) -> Path:
    return cpu.bundle("c1_baseline")


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_no_driver(bundle: Path, backend: str) -> None:
    with pytest.raises(UnsupportedError, match=r"expected an NVIDIA GPU with its driver.*libcuda\.so\.1"):
        Session(bundle, device="cuda:0", backend=backend)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("tensorrt", "cpu", '"cuda:0"'),
        ("tensorrt", "cuda", '"cuda:0"'),
        ("tensorrt", "cuda:x", '"cuda:0"'),
        ("onnxruntime", "cuda", '"cpu", "cuda:0"'),
        ("onnxruntime", "cuda:-1", '"cpu", "cuda:0"'),
        ("onnxruntime", "gpu", '"cpu", "cuda:0"'),
    ],
)
def test_names_of_devices(bundle: Path, backend: str, device: str, expected: str) -> None:
    with pytest.raises(UnsupportedError, match=f'backend {backend} expects {expected}.*"{device}"'):
        Session(bundle, device=device, backend=backend)
