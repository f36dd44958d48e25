"""The C library: found, loaded, version-checked; one ctypes signature per prototype of include/lococo.h."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from . import _exceptions as errors

ABI_VERSION = 2

# lococo_status -> exception
_ERRORS: dict[int, type[errors.LococoError]] = {
    1: errors.InvalidArgumentError,
    2: errors.NotFoundError,
    3: errors.CorruptError,
    4: errors.VersionError,
    5: errors.UnsupportedError,
    6: errors.StateMismatchError,
    7: errors.BusyError,
    8: errors.DeadSessionError,
    9: errors.StorageError,
    10: errors.NoSpaceError,
    11: errors.OutOfMemoryError,
    12: errors.BackendError,
    13: errors.InternalError,
    14: errors.PoolFullError,
    15: errors.CancelledError,
}


class Options(ctypes.Structure):
    """lococo_options"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("device", c_char_p),
        ("backend", c_char_p),
        ("backend_library", c_char_p),
        ("num_threads", c_int32),
        ("skip_hashes", c_int32),
    )


class ModelInfo(ctypes.Structure):
    """lococo_model_info"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("vocab_size", c_int32),
        ("num_layers", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("mem_size", c_int32),
        ("capacity", c_int32),
        ("block_size", c_int32),
        ("max_batch", c_int32),
        ("state_bytes", c_uint64),
        ("session_bytes", c_uint64),
        ("batch_bytes", c_uint64),
        ("bundle_id", c_char_p),
        ("dtype", c_char_p),
    )


class CSamplingParams(ctypes.Structure):
    """lococo_sampling_params"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("temperature", c_double),
        ("top_k", c_int32),
        ("top_p", c_double),
        ("seed", c_uint64),
        ("min_p", c_double),
        ("typical_p", c_double),
        ("repetition_penalty", c_double),
        ("presence_penalty", c_double),
        ("frequency_penalty", c_double),
        ("logit_bias_ids", POINTER(c_int32)),
        ("logit_bias_values", POINTER(c_float)),
        ("num_logit_bias", c_size_t),
        ("allowed_tokens", POINTER(c_uint32)),
        ("num_allowed_words", c_size_t),
        ("stop_token_ids", POINTER(c_int32)),
        ("num_stop_token_ids", c_size_t),
        ("ignore_eos", c_int32),
    )


class PoolOptions(ctypes.Structure):
    """lococo_pool_options"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("directory", c_char_p),
        ("budget_bytes", c_uint64),
        ("max_sessions", c_uint64),
    )


class PoolInfo(ctypes.Structure):
    """lococo_pool_info"""

    _fields_ = (
        ("struct_size", c_size_t),
        ("max_sessions", c_uint64),
        ("session_bytes", c_uint64),
        ("memory_bytes", c_uint64),
        ("num_acquired", c_int64),
        ("num_idle", c_int64),
        ("num_parked", c_int64),
        ("parks", c_int64),
        ("resumes", c_int64),
    )


LogFn = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
TokenFn = ctypes.CFUNCTYPE(c_int, c_int32, c_void_p)
PlaceFn = ctypes.CFUNCTYPE(c_int, c_char_p, c_int, c_void_p)

_FLOATS, _IDS = POINTER(c_float), POINTER(c_int32)

# name: (restype, argtypes); a restype of c_int is a lococo_status and is checked by `call`
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lococo_abi_version": (c_int32, ()),
    "lococo_version": (c_char_p, ()),
    "lococo_last_error": (c_char_p, ()),
    "lococo_set_log_callback": (None, (LogFn, c_void_p)),
    "lococo_model_open": (c_int, (c_char_p, POINTER(Options), POINTER(c_void_p))),
    "lococo_model_close": (None, (c_void_p,)),
    "lococo_model_get_info": (c_int, (c_void_p, POINTER(ModelInfo))),
    "lococo_session_create": (c_int, (c_void_p, POINTER(c_void_p))),
    "lococo_session_destroy": (None, (c_void_p,)),
    "lococo_session_reset": (c_int, (c_void_p,)),
    "lococo_session_clone": (c_int, (c_void_p, POINTER(c_void_p))),
    "lococo_session_prefill": (c_int, (c_void_p, _IDS, c_size_t, _FLOATS)),
    "lococo_session_step": (c_int, (c_void_p, c_int32)),
    "lococo_session_logits": (c_int, (c_void_p, POINTER(_FLOATS))),
    "lococo_session_sample": (c_int, (c_void_p, POINTER(CSamplingParams), _IDS)),
    "lococo_session_distribution": (c_int, (c_void_p, POINTER(CSamplingParams), _FLOATS)),
    "lococo_session_logprobs": (c_int, (c_void_p, c_int32, c_int32, _FLOATS, _IDS, _FLOATS)),
    "lococo_session_generate": (
        c_int,
        (c_void_p, POINTER(CSamplingParams), c_int32, TokenFn, c_void_p, POINTER(c_int32)),
    ),
    "lococo_session_cancel": (c_int, (c_void_p, c_int32)),
    "lococo_session_position": (c_int, (c_void_p, POINTER(c_int64))),
    "lococo_session_live_slots": (c_int, (c_void_p, POINTER(c_int32))),
    "lococo_session_windows": (c_int, (c_void_p, POINTER(c_int64), POINTER(c_double))),
    "lococo_session_counters": (c_int, (c_void_p, POINTER(c_int64), POINTER(c_int64), POINTER(c_int64))),
    "lococo_session_state_size": (c_int, (c_void_p, POINTER(c_size_t))),
    "lococo_session_state_get": (c_int, (c_void_p, c_void_p, c_size_t)),
    "lococo_session_state_set": (c_int, (c_void_p, c_void_p, c_size_t)),
    "lococo_session_save": (c_int, (c_void_p, c_char_p)),
    "lococo_session_load": (c_int, (c_void_p, c_char_p)),
    "lococo_stops_create": (c_int, (POINTER(c_char_p), c_size_t, POINTER(c_void_p))),
    "lococo_stops_destroy": (None, (c_void_p,)),
    "lococo_stops_push": (c_int, (c_void_p, c_char_p, c_size_t, POINTER(c_void_p), POINTER(c_size_t), _IDS)),
    "lococo_stops_finish": (c_int, (c_void_p, POINTER(c_void_p), POINTER(c_size_t))),
    "lococo_stops_reset": (c_int, (c_void_p,)),
    "lococo_pool_create": (c_int, (c_void_p, POINTER(PoolOptions), POINTER(c_void_p))),
    "lococo_pool_destroy": (None, (c_void_p,)),
    "lococo_pool_acquire": (c_int, (c_void_p, c_char_p, c_char_p, c_int32, POINTER(c_void_p))),
    "lococo_pool_release": (c_int, (c_void_p, c_void_p)),
    "lococo_pool_flush": (c_int, (c_void_p, c_char_p)),
    "lococo_pool_remove": (c_int, (c_void_p, c_char_p)),
    "lococo_pool_find": (c_int, (c_void_p, c_char_p, POINTER(c_int))),
    "lococo_pool_list": (c_int, (c_void_p, PlaceFn, c_void_p)),
    "lococo_pool_get_info": (c_int, (c_void_p, POINTER(PoolInfo))),
    "lococo_batch_create": (c_int, (c_void_p, POINTER(c_void_p))),
    "lococo_batch_destroy": (None, (c_void_p,)),
    "lococo_batch_add": (c_int, (c_void_p, c_void_p)),
    "lococo_batch_remove": (c_int, (c_void_p, c_void_p)),
    "lococo_batch_get_implementation": (c_int, (c_void_p, POINTER(c_int))),
    "lococo_batch_step": (c_int, (c_void_p, POINTER(c_void_p), _IDS, c_size_t)),
}


def package_folders() -> list[Path]:
    """The folders of this package: an editable install leaves the sources in place, the library in site-packages."""
    spec = importlib.util.find_spec("lococo_runtime")
    found = [str(Path(__file__).parent), *(spec.submodule_search_locations or [] if spec else [])]
    return [Path(p) for p in dict.fromkeys(found)]


def library_path() -> Path:
    """Where the C library is: $LOCOCO_LIBRARY, or in this package's lib folder.

    Raises:
        NotFoundError: listing every path that was tried.
    """
    name = {"darwin": "liblococo.dylib", "win32": "lococo.dll"}.get(sys.platform, "liblococo.so")
    tried = [folder / "lib" / name for folder in package_folders()]
    if explicit := os.environ.get("LOCOCO_LIBRARY"):
        tried = [Path(explicit)]
    for path in tried:
        if path.is_file():
            return path
    raise errors.NotFoundError(
        "the lococo C library was not found; tried "
        + ", ".join(map(str, tried))
        + "; install the package with pip, or point LOCOCO_LIBRARY to it"
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, with signatures declared.

    Raises:
        NotFoundError: see `library_path`.
        VersionError: a library of another ABI.
    """
    path = library_path()
    lib = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    found = lib.lococo_abi_version()
    if found != ABI_VERSION:
        raise errors.VersionError(
            f"{path}: ABI version: expected {ABI_VERSION}, got {found}; reinstall lococo-export so that both match"
        )
    return lib


@contextlib.contextmanager
def library_log() -> Iterator[list[str]]:
    """What the library reports meanwhile, such as which TensorRT and which engines it took."""
    lines: list[str] = []

    def keep(level: int, message: bytes, user: object) -> None:
        lines.append(message.decode(errors="replace"))

    callback = LogFn(keep)  # must outlive its use
    library().lococo_set_log_callback(callback, None)
    try:
        yield lines
    finally:
        library().lococo_set_log_callback(LogFn(), None)


def encode_path(path: str | os.PathLike[str]) -> bytes:
    """A path for the library. Raises InvalidArgumentError where it is none, or has a NUL, which would cut it short."""
    try:
        encoded = os.fsencode(path)
    except (TypeError, UnicodeEncodeError) as e:
        raise errors.InvalidArgumentError(f"path: expected a string or a path, got {path!r}") from e
    if b"\0" in encoded:
        raise errors.InvalidArgumentError(f"path: expected no NUL character, got {path!r}")
    return encoded


def call(name: str, *args: Any) -> None:
    """Calls a function that returns a status and raises the exception that belongs to it."""
    lib = library()
    status = getattr(lib, name)(*args)
    if status:
        text = lib.lococo_last_error().decode("utf-8", "replace")
        raise _ERRORS.get(status, errors.InternalError)(text or f"{name} failed with status {status}")


def find_onnxruntime() -> str | None:
    """libonnxruntime of the installed wheel, which is not imported; None leaves the search to the library."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder, "capi").glob("libonnxruntime.so*")) or sorted(
            Path(folder, "capi").glob("libonnxruntime*.dylib")
        )
        if found:
            return str(found[-1])
    return None


@functools.cache
def load_cuda_libraries() -> None:
    """Loads CUDA and cuDNN out of NVIDIA's wheels, where those are installed.

    ONNX Runtime's CUDA provider takes what is loaded already; elsewhere it searches as the system's loader does.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    for name in ("cudart", "cublasLt", "cublas", "curand", "cudnn"):  # each needs only those before it
        for path in sorted(p for folder in folders for p in folder.glob(f"*/lib/lib{name}.so.*")):
            with contextlib.suppress(OSError):  # whether it was needed, and what is missing, the provider will say
                ctypes.CDLL(str(path))
