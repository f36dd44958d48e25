"""What the NVIDIA driver says about a device, through ctypes: no torch, no CUDA toolkit."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lococo_runtime._exceptions import InvalidArgumentError, UnsupportedError

DRIVER_LIBRARY = "libcuda.so.1"
L4T_RELEASE = Path("/etc/nv_tegra_release")

# CUdevice_attribute of cuda.h; part of the driver's ABI
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Device:
    """A CUDA device.

    Attributes:
        index: as in "cuda:0", after CUDA_VISIBLE_DEVICES.
        name: such as "NVIDIA H100 80GB HBM3".
        sm: compute capability, 90 for 9.0.
        cuda_version: the newest CUDA that the driver runs, such as "13.0".
        total_bytes: memory of the device; on Jetson the memory it shares with the CPU.
    """

    index: int
    name: str
    sm: int
    cuda_version: str
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (sm{self.sm}, {self.total_bytes / 2**30:.1f} GiB, driver for CUDA {self.cuda_version})"


class _Driver:
    """libcuda, initialized."""

    def __init__(self) -> None:
        try:
            self.lib = ctypes.CDLL(DRIVER_LIBRARY)
        except OSError as e:
            raise UnsupportedError(
                f"no NVIDIA driver on this machine: {e}; install the driver, or inside a container pass --gpus all"
            ) from e
        code = self.lib.cuInit(0)
        if code == _NO_DEVICE:
            raise UnsupportedError(
                "the NVIDIA driver sees no device; is CUDA_VISIBLE_DEVICES set to hide it, or was the container"
                " started without --gpus all?"
            )
        self.check(code, "cuInit")

    def check(self, code: int, what: str) -> None:
        if code == 0:
            return
        text = ctypes.c_char_p()
        self.lib.cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise UnsupportedError(f"{what}: CUDA driver error {code}: {reason}; does nvidia-smi work here?")

    def integer(self, function: str, *args: object) -> int:
        """An int* out parameter, which comes first."""
        value = ctypes.c_int()
        self.check(getattr(self.lib, function)(ctypes.byref(value), *args), function)
        return value.value

    def handle(self, index: int) -> int:
        count = self.integer("cuDeviceGetCount")
        if not 0 <= index < count:
            raise InvalidArgumentError(f"device: expected 0 to {count - 1}, got {index}; {count} visible")
        return self.integer("cuDeviceGet", index)


def query_device(index: int = 0) -> Device:
    """The device `index`.

    Raises:
        UnsupportedError: no driver, no device, or a driver that fails.
        InvalidArgumentError: fewer devices.
    """
    driver = _Driver()
    handle = driver.handle(index)
    name = ctypes.create_string_buffer(256)
    driver.check(driver.lib.cuDeviceGetName(name, len(name), handle), "cuDeviceGetName")
    total = ctypes.c_size_t()
    driver.check(driver.lib.cuDeviceTotalMem_v2(ctypes.byref(total), handle), "cuDeviceTotalMem")
    major = driver.integer("cuDeviceGetAttribute", _COMPUTE_CAPABILITY_MAJOR, handle)
    minor = driver.integer("cuDeviceGetAttribute", _COMPUTE_CAPABILITY_MINOR, handle)
    version = driver.integer("cuDriverGetVersion")  # 1000 * major + 10 * minor
    return Device(
        index=index,
        name=name.value.decode(errors="replace"),
        sm=10 * major + minor,
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        total_bytes=total.value,
    )


def free_bytes(index: int = 0) -> int:
    """Free memory of the device; creates its primary context for the time of the call.

    Raises:
        UnsupportedError, InvalidArgumentError: as `query_device`.
    """
    driver = _Driver()
    with _primary_context(driver, driver.handle(index)):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        driver.check(driver.lib.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
    return free.value


@contextlib.contextmanager
def _primary_context(driver: _Driver, handle: int) -> Iterator[None]:
    context = ctypes.c_void_p()
    driver.check(driver.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    try:
        driver.check(driver.lib.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
        try:
            yield
        finally:
            driver.lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.lib.cuDevicePrimaryCtxRelease_v2(handle)


def l4t_release() -> str:
    """The Jetson Linux release, such as "R36 (release), REVISION: 4.3", or "" where this is not a Jetson."""
    try:
        first = L4T_RELEASE.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return ""
    return ",".join(first.removeprefix("# ").split(",")[:2])
