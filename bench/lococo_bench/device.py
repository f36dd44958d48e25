"""The device a measurement runs on: its clock, its memory, its copy bandwidth, and what it says of itself.

A CUDA device is reached through the driver (libcuda) by ctypes, power and clocks through nvidia-ml-py where it is
installed: no torch, no CUDA toolkit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lococo_runtime import InvalidArgumentError, UnsupportedError
from lococo_runtime._process import memory_bytes

COPY_BYTES = 1 << 30  # of one copy; less where memory is short
COPIES = 20


class Device(Protocol):
    """What the measurements need of a device."""

    index: int | None
    """Of a CUDA device."""

    def synchronize(self) -> None:
        """Waits until everything that was launched has ended."""

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large copy within the device's memory, the best of several."""

    def memory(self) -> dict[str, Any]:
        """`peak_memory_bytes` or None, `memory_by` which says how it was found; on a GPU `device_used_bytes` too."""

    def energy_joules(self) -> float | None:
        """Of the whole device since the driver was loaded; None where it is not counted."""

    def describe(self) -> dict[str, Any]:
        """Names, versions, power mode and clocks; None for what cannot be read."""


def open_device(name: str, num_threads: int = 0) -> Device:
    """The device "cpu", or "cuda:0" and on.

    Raises:
        InvalidArgumentError: another name, or a device that is not there.
        UnsupportedError: no NVIDIA driver.
    """
    if name == "cpu":
        return CpuDevice(num_threads)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise InvalidArgumentError(f'device: expected "cpu" or "cuda:0" and on, got "{name}"')
    return CudaDevice(int(index))


# --- CPU --------------------------------------------------------------------------------------------------------------


class CpuDevice:
    """The host. `num_threads` 0 takes one per core."""

    def __init__(self, num_threads: int = 0) -> None:
        self.index: int | None = None
        if num_threads < 0:
            raise InvalidArgumentError(f"num_threads: expected 0 or more, got {num_threads}")
        self.num_threads = num_threads or len(os.sched_getaffinity(0))

    def synchronize(self) -> None:
        """Calls are synchronous."""

    def copy_bandwidth(self) -> float:
        """By as many threads as the model uses, on buffers far larger than a cache."""
        source = np.ones(COPY_BYTES // 4, np.uint8)
        target = np.zeros_like(source)
        pieces = list(
            zip(np.array_split(target, self.num_threads), np.array_split(source, self.num_threads), strict=True)
        )
        best = float("inf")
        with ThreadPoolExecutor(self.num_threads) as pool:
            for _ in range(5):
                start = time.perf_counter()
                list(pool.map(lambda piece: np.copyto(*piece), pieces))
                best = min(best, time.perf_counter() - start)
        bandwidth = 2 * source.nbytes / best
        del source, target, pieces
        with contextlib.suppress(OSError):  # where it is not allowed, these buffers are part of the peak
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
        return bandwidth

    def memory(self) -> dict[str, Any]:
        """The process's peak resident memory, Python and mapped weights included."""
        return {"peak_memory_bytes": memory_bytes("VmHWM"), "memory_by": "VmHWM"}

    def energy_joules(self) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return {"gpu_info": None, "power_mode": _first_line(governor) or nvpmodel(), "clocks": None}


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def nvpmodel() -> str | None:
    """A Jetson's power mode, such as "MAXN"; None elsewhere."""
    try:
        out = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    modes = [line.partition(":")[2].strip() for line in out.splitlines() if line.startswith("NV Power Mode")]
    return modes[0] if modes else None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


# --- CUDA -------------------------------------------------------------------------------------------------------------


class CudaDevice:
    """A GPU, in its primary context, which is the one that TensorRT, ONNX Runtime and torch use.

    Raises:
        UnsupportedError: no driver, or a driver that fails.
        InvalidArgumentError: no device of that index.
    """

    def __init__(self, index: int, driver: Any = None, nvml: Any = None) -> None:
        """`driver` and `nvml` are libcuda and pynvml; others stand in for them in tests."""
        self.index: int | None = index
        self.driver = driver or _load_driver()
        self.check("cuInit", 0)
        count = ctypes.c_int()
        self.check("cuDeviceGetCount", ctypes.byref(count))
        if index >= count.value:
            raise InvalidArgumentError(f"device: expected cuda:0 to cuda:{count.value - 1}, got cuda:{index}")
        self.handle, context = ctypes.c_int(), ctypes.c_void_p()
        self.check("cuDeviceGet", ctypes.byref(self.handle), index)
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.handle)
        self.check("cuCtxSetCurrent", context)
        self.nvml = nvml or _load_nvml()
        self.nvml_handle = self._nvml("nvmlDeviceGetHandleByPciBusId", self._text("cuDeviceGetPCIBusId", 32).encode())
        self.used_before = self.used_bytes()

    def check(self, function: str, *args: Any) -> None:
        """Calls a function of the driver."""
        code = getattr(self.driver, function)(*args)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self.driver.cuGetErrorString(code, ctypes.byref(text))
        raise UnsupportedError(
            f"{function}: CUDA driver error {code}: {(text.value or b'unknown').decode()}; does nvidia-smi work here?"
        )

    def synchronize(self) -> None:
        self.check("cuCtxSynchronize")

    def used_bytes(self) -> int:
        """Memory in use on the device, by everyone."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def copy_bandwidth(self) -> float:
        """By cuMemcpyDtoDAsync between two buffers, timed by events."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        nbytes = ctypes.c_size_t(min(COPY_BYTES, free.value // 4))
        buffers = [ctypes.c_uint64(), ctypes.c_uint64()]
        events = [ctypes.c_void_p(), ctypes.c_void_p()]
        best = float("inf")
        try:
            for buffer in buffers:
                self.check("cuMemAlloc_v2", ctypes.byref(buffer), nbytes)
            for event in events:
                self.check("cuEventCreate", ctypes.byref(event), 0)
            for _ in range(COPIES):
                self.check("cuEventRecord", events[0], None)
                self.check("cuMemcpyDtoDAsync_v2", buffers[1], buffers[0], nbytes, None)
                self.check("cuEventRecord", events[1], None)
                self.check("cuEventSynchronize", events[1])
                milliseconds = ctypes.c_float()
                self.check("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
                best = min(best, milliseconds.value / 1e3)
        finally:
            for event in events:
                if event.value:
                    self.check("cuEventDestroy_v2", event)
            for buffer in buffers:
                if buffer.value:
                    self.check("cuMemFree_v2", buffer)
        return 2 * nbytes.value / best

    def memory(self) -> dict[str, Any]:
        """What the driver holds for this process, context included; without NVML what the device gained since
        this object was made. All of it is allocated by the time it is asked for, so it is the peak."""
        used = self.used_bytes()
        for process in self._nvml("nvmlDeviceGetComputeRunningProcesses", self.nvml_handle) or []:
            # inside a container the ids may be the host's: then none is ours
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return {
                    "peak_memory_bytes": int(process.usedGpuMemory),
                    "memory_by": "nvml-process",
                    "device_used_bytes": used,
                }
        return {
            "peak_memory_bytes": used - self.used_before,
            "memory_by": "device-delta",
            "device_used_bytes": used,
        }

    def energy_joules(self) -> float | None:
        millijoules = self._nvml("nvmlDeviceGetTotalEnergyConsumption", self.nvml_handle)
        return None if millijoules is None else millijoules / 1e3

    def describe(self) -> dict[str, Any]:
        version = ctypes.c_int()
        self.check("cuDriverGetVersion", ctypes.byref(version))
        limit = self._nvml("nvmlDeviceGetEnforcedPowerLimit", self.nvml_handle)
        clocks = {}
        if self.nvml is not None:
            for name, kind in (("sm", self.nvml.NVML_CLOCK_SM), ("memory", self.nvml.NVML_CLOCK_MEM)):
                clocks[f"{name}_mhz"] = self._nvml("nvmlDeviceGetClockInfo", self.nvml_handle, kind)
                clocks[f"{name}_max_mhz"] = self._nvml("nvmlDeviceGetMaxClockInfo", self.nvml_handle, kind)
        return {
            "gpu_info": self._text("cuDeviceGetName", 256),
            "driver_version": self._nvml("nvmlSystemGetDriverVersion") or _kernel_driver_version(),
            "cuda_version": f"{version.value // 1000}.{version.value % 1000 // 10}",
            "power_mode": nvpmodel() if limit is None else f"limit {limit / 1e3:.0f} W",
            "clocks": clocks or None,
        }

    def _text(self, function: str, size: int) -> str:
        buffer = ctypes.create_string_buffer(size)
        self.check(function, buffer, size, self.handle)
        return buffer.value.decode(errors="replace")

    def _nvml(self, function: str, *args: Any) -> Any:
        """What NVML says, None where it is absent or does not know."""
        if self.nvml is None or None in args:
            return None
        try:
            return getattr(self.nvml, function)(*args)
        except self.nvml.NVMLError:
            return None


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise UnsupportedError(
            f"no NVIDIA driver on this machine: {e}; install the driver, or inside a container pass --gpus all"
        ) from e


def _load_nvml() -> Any:
    """pynvml, initialized, or None: then power, clocks and energy are not reported."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # a Jetson has none
        return None
    return nvml


def _kernel_driver_version() -> str | None:
    line = _first_line(Path("/sys/module/nvidia/version"))
    return line.partition("\n")[0] if line else None
