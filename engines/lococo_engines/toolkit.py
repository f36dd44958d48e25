"""TensorRT as it is installed: versions 8.6 to 11 and TensorRT for RTX differ in what their Python modules have."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from lococo_runtime._c_api import library_path
from lococo_runtime._exceptions import BackendError, InternalError, UnsupportedError

from .gpu import Device
from .kernels import PLUGIN
from .preflight import release

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
_PACKAGES = {
    "tensorrt": "on a Jetson it comes with JetPack (python3-libnvinfer); elsewhere: pip install tensorrt"
    " 'lococo-export[tensorrt]'",
    "tensorrt_rtx": "pip install 'lococo-export[rtx]'",
}


_COMPILE = "compile it for the installed TensorRT: pip install with -C cmake.define.LOCOCO_TENSORRT_INCLUDE=..."
_ERROR_BYTES = 3072  # as module.h has it


@dataclass(frozen=True)
class Toolkit:
    """An installed TensorRT.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx".
        trt: its module.
        polygraphy: the module polygraphy.backend.trt, or .tensorrt_rtx.
        log: where its messages go.
    """

    flavour: str
    trt: Any
    polygraphy: Any
    log: Any

    @property
    def version(self) -> str:
        """Numbers alone, as the library says it: "10.0.0" of "10.0.0b6"."""
        found = re.match(r"[0-9]+(\.[0-9]+)*", str(self.trt.__version__))
        return found[0] if found else ""

    @property
    def release(self) -> str:
        """Three numbers: "8.6.0"."""
        return ".".join(release(self.version))

    @property
    def strongly_typed(self) -> bool:
        """Networks follow the ONNX's dtypes; TensorRT 8.6 chooses them itself."""
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def network_flags(self) -> int:
        flags = self.trt.NetworkDefinitionCreationFlag
        names = ["STRONGLY_TYPED"] if self.strongly_typed else []
        if int(self.version.partition(".")[0]) < 10 and hasattr(flags, "EXPLICIT_BATCH"):
            names.append("EXPLICIT_BATCH")  # required by 8.6, deprecated in 10, gone in 11
        return sum(1 << int(getattr(flags, name)) for name in names)

    def dtype(self, value: Any) -> str:
        """Our name of a trt.DataType."""
        name = str(value.name)
        return DTYPES.get(name, name.lower())

    def native_dtype(self, dtype: str) -> Any:
        """The trt.DataType of our name."""
        return getattr(self.trt.DataType, next(k for k, v in DTYPES.items() if v == dtype))

    def require_dtype(self, dtype: str) -> None:
        """Raises UnsupportedError where this TensorRT cannot hold tensors of `dtype`."""
        name = next(k for k, v in DTYPES.items() if v == dtype)
        if not hasattr(self.trt.DataType, name):
            raise UnsupportedError(
                f"TensorRT {self.version} has no {dtype}; export the checkpoint with --fp16, or use TensorRT 10"
            )

    def member(self, enum: str, name: str, option: str) -> Any:
        """trt.`enum`.`name`, or UnsupportedError that says which option this TensorRT lacks."""
        value = getattr(getattr(self.trt, enum, None), name, None)
        if value is None:
            raise UnsupportedError(f"{option}: TensorRT {self.version} ({self.flavour}) does not offer it")
        return value

    def plugin_creator(self) -> Any:
        """The creator of this project's plugin, from liblococo_trt.

        Raises:
            UnsupportedError: liblococo_trt is not there, or was compiled for another TensorRT.
        """
        path = Path(os.environ.get("LOCOCO_TRT_LIBRARY") or library_path().with_name("liblococo_trt.so"))
        advice = f"{_COMPILE}; or build with --kernels tensorrt"
        if not path.is_file():
            raise UnsupportedError(f"kernels lococo: {path} is not there; {advice}")
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        try:
            status = ctypes.CDLL(os.fspath(path)).lococo_register_plugin(text)
        except (OSError, AttributeError) as e:
            raise UnsupportedError(f"kernels lococo: {path} does not load: {e}; {advice}") from e
        if status:
            raise UnsupportedError(f"kernels lococo: {path}: {text.value.decode()}; {advice}")
        registry = self.trt.get_plugin_registry()
        find = registry.get_plugin_creator if hasattr(registry, "get_plugin_creator") else registry.get_creator
        creator = find(*PLUGIN)
        if creator is None:
            raise UnsupportedError(
                f"kernels lococo: TensorRT {self.version} of Python is not the TensorRT that {path} found; let"
                " LD_LIBRARY_PATH name the folder of the former's libnvinfer.so"
            )
        return creator

    def create_builder(self, device: Device | None) -> Any:
        try:
            return self.trt.Builder(self.log)
        except TypeError as e:  # how the bindings report a null pointer
            raise BackendError(
                f"TensorRT {self.version} does not start on {device or 'this machine'}: {self.log.summary()};"
                " CUDA error 35 means that the driver is too old for it"
            ) from e


def load_toolkit(flavour: str, *, verbose: bool = False) -> Toolkit:
    """Imports TensorRT and Polygraphy.

    Raises:
        UnsupportedError: one is not installed; says how to get it.
    """
    trt = _import(flavour, _PACKAGES[flavour])
    how = f"pip install 'lococo-export[{'tensorrt' if flavour == 'tensorrt' else 'rtx'}]'"
    config = _import("polygraphy.config", how)
    rtx = flavour == "tensorrt_rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise InternalError("Polygraphy serves one flavour of TensorRT a process")
    config.USE_TENSORRT_RTX = rtx  # before anything of Polygraphy is imported that asks for it
    polygraphy = _import("polygraphy.backend.trt", how)
    logger = _import("polygraphy.logger", how).G_LOGGER
    logger.module_severity = logger.INFO if verbose else logger.CRITICAL
    return Toolkit(flavour, trt, polygraphy, _make_log(trt, sys.stderr if verbose else None))


def _import(name: str, how: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError) as e:
        raise UnsupportedError(f"{name.partition('.')[0]} is not usable here: {e}; {how}") from e


def _make_log(trt: Any, stream: TextIO | None) -> Any:
    """A trt.ILogger that keeps errors for our own messages and, if `stream`, prints everything."""
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
    warning = trt.ILogger.WARNING

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.last_warning = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                self.errors.append(message)
            elif severity == warning:
                self.last_warning = message
            if stream is not None:
                print(f"[TensorRT {severity.name}] {message}", file=stream)

        def take_errors(self) -> list[str]:
            """The errors so far, each once, which are then forgotten."""
            errors, self.errors = list(dict.fromkeys(self.errors)), []
            return errors

        def summary(self) -> str:
            """The last few errors, in one line."""
            return "; ".join(self.errors[-3:]) or self.last_warning or "it gives no reason; try --verbose"

    return Log()
