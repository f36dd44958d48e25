"""One sequence over a fixed number of slots."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import _c_api as c
from ._exceptions import ClosedError, DeadSessionError, EmptyPromptError, InvalidArgumentError, TokenIdError
from .bundle import Manifest, read_manifest
from .sampling import SamplingParams, TokenLogprobs, check_integer, or_default

if TYPE_CHECKING:
    from .batch import Batch

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
TokenMask = npt.NDArray[np.uint32] | npt.NDArray[np.int32]

_T = TypeVar("_T", bound="_Handle")


class _Handle:
    """Something of the C library that is closed once: by hand, by `with`, or with the object."""

    _handle: ctypes.c_void_p

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class Model(_Handle):
    """An opened bundle, shared by its sessions. Usable as a context manager.

    Args:
        bundle: the directory that lococo-export made.
        device: "cpu", or "cuda:0" and on.
        backend: "onnxruntime", which on a GPU is its CUDA provider (package onnxruntime-gpu), or "tensorrt", which runs
            the engines that lococo-build made.
        num_threads: 0 takes one per physical core; the first model opened decides for the process.
        verify: check every file's sha256, not only its size.
        backend_library: path of libonnxruntime, by default $LOCOCO_ONNXRUNTIME or the installed package's; with backend
            "tensorrt" of liblococo_trt, by default beside liblococo.

    Attributes:
        manifest: of the bundle, checked.
        vocab_size: token ids are below it; V of `Session.logits`.
        state_bytes: of a state without its header, at any position.
        session_bytes: of memory that each session takes, its buffers included.
        max_batch: how many sessions a `Batch` steps at once; 1 if the bundle was not exported for more.
        batch_bytes: of memory that a `Batch` takes beside its sessions; 0 where it is a loop.

    Raises:
        NotFoundError, CorruptError, VersionError: the bundle is not there, damaged, or of another schema.
        NotFoundError: ONNX Runtime is not installed, or on a GPU a library that it needs, such as cuDNN.
        UnsupportedError: a device, backend or dtype that is not available here.
        OutOfMemoryError: the device has less memory left than the model needs.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "cpu",
        backend: str = "onnxruntime",
        num_threads: int = 0,
        verify: bool = True,
        backend_library: str | os.PathLike[str] | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        path = c.encode_path(bundle)
        for name, value in (("device", device), ("backend", backend)):
            if not isinstance(value, str):
                raise InvalidArgumentError(f"{name}: expected a string, got {value!r}")
        check_integer("num_threads", num_threads, 2**31 - 1)
        self.manifest: Manifest = read_manifest(bundle)
        if backend_library is None and backend == "onnxruntime" and not os.environ.get("LOCOCO_ONNXRUNTIME"):
            backend_library = c.find_onnxruntime()
        if backend == "onnxruntime" and device != "cpu":
            c.load_cuda_libraries()
        options = c.Options(
            ctypes.sizeof(c.Options),
            device.encode(),
            backend.encode(),
            None if backend_library is None else c.encode_path(backend_library),
            num_threads,
            0 if verify else 1,
        )
        c.call("lococo_model_open", path, ctypes.byref(options), ctypes.byref(self._handle))
        info = c.ModelInfo(ctypes.sizeof(c.ModelInfo))
        c.call("lococo_model_get_info", self._handle, ctypes.byref(info))
        self.vocab_size: int = info.vocab_size
        self.state_bytes: int = info.state_bytes
        self.session_bytes: int = info.session_bytes
        self.max_batch: int = info.max_batch
        self.batch_bytes: int = info.batch_bytes
        self._lock = threading.Lock()
        self._open_sessions = 0
        self._closing = False

    def session(self) -> Session:
        """A new, empty session that shares this model's weights."""
        return Session(self)

    def close(self) -> None:
        """Frees the weights, once the last session is closed."""
        self._closing = True
        self._count(0)

    def _count(self, change: int) -> None:
        """Counts open sessions; the last one to go frees a closed model."""
        with self._lock:
            self._open_sessions += change
            if self._closing and self._handle and self._open_sessions == 0:
                c.library().lococo_model_close(self._handle)
                self._handle = ctypes.c_void_p()


class Session(_Handle):
    """One sequence: append tokens, read logits, save and restore. A context manager; one thread at a time.

    Args:
        bundle: a bundle directory, or an opened `Model` to share its weights.
        device, options: as `Model`, when `bundle` is a directory.

    Attributes:
        model: whose session it is.

    Raises:
        see `Model`.
    """

    _batch: Batch | None = None

    def __init__(self, bundle: str | os.PathLike[str] | Model, device: str = "cpu", **options: Any) -> None:
        self._handle = ctypes.c_void_p()
        self._owns_model = not isinstance(bundle, Model)
        self.model = bundle if isinstance(bundle, Model) else Model(bundle, device=device, **options)
        if not self.model._handle or self.model._closing:
            raise ClosedError("the model is closed; open it again before making sessions")
        c.call("lococo_session_create", self.model._handle, ctypes.byref(self._handle))
        self.model._count(+1)

    # --- reading and writing tokens ----------------------------------------------------------------------------------

    def prefill(self, ids: TokenIds, return_all: bool = False) -> Logits:
        """Reads `ids` (T) in forwards of at most block_size tokens, from the current position on.

        Returns:
            float32 logits after the last token, (V); with `return_all` after every token, (T, V).

        Raises:
            EmptyPromptError: no ids.
            TokenIdError: an id outside the vocabulary; nothing has been read then.
            InvalidArgumentError: ids that are no integers or not one-dimensional.
            BusyError, ClosedError, DeadSessionError, BackendError.
        """
        array = check_ids(ids, self.model.vocab_size)
        out = np.empty((array.size, self.model.vocab_size), np.float32) if return_all else None
        c.call(
            "lococo_session_prefill",
            self._open(),
            array.ctypes.data_as(c._IDS),
            array.size,
            None if out is None else out.ctypes.data_as(c._FLOATS),
        )
        return self.logits() if out is None else out

    def step(self, token_id: int) -> Logits:
        """Reads one token in a forward of one and returns the float32 logits after it, (V). Raises as `prefill`."""
        c.call("lococo_session_step", self._open(), int(check_ids([token_id], self.model.vocab_size)[0]))
        return self.logits()

    def logits(self) -> Logits:
        """A copy of the float32 logits after the last token read, (V). Raises InvalidArgumentError when empty."""
        pointer = c._FLOATS()
        c.call("lococo_session_logits", self._open(), ctypes.byref(pointer))
        return np.array(np.ctypeslib.as_array(pointer, (self.model.vocab_size,)), np.float32)

    def sample(self, params: SamplingParams | None = None, allowed_tokens: TokenMask | None = None) -> int:
        """Chooses a token from the current logits; reads nothing.

        Args:
            params: less what no single token needs: max_tokens and what ends a text; for logprobs call `logprobs`.
            allowed_tokens: a mask of shape (ceil(V / 32)), bit id % 32 of word id // 32 set where a token is allowed,
                as llguidance and xgrammar make them; None allows all.

        Raises:
            InvalidArgumentError: a parameter out of range, a mask of another size, or no token left.
        """
        token = ctypes.c_int32()
        native = self._native(params, allowed_tokens)
        c.call("lococo_session_sample", self._open(), ctypes.byref(native), ctypes.byref(token))
        return token.value

    def distribution(self, params: SamplingParams | None = None, allowed_tokens: TokenMask | None = None) -> Logits:
        """The probabilities that `sample` draws from, float32 (V); 1 at one token if greedy. Raises as `sample`."""
        out = np.empty(self.model.vocab_size, np.float32)
        native = self._native(params, allowed_tokens)
        pointer = out.ctypes.data_as(c._FLOATS)
        c.call("lococo_session_distribution", self._open(), ctypes.byref(native), pointer)
        return out

    def logprobs(self, token_id: int, top: int = 0) -> TokenLogprobs:
        """Log-probabilities of `token_id` and of the `top` likeliest tokens, after the last token read.

        They are the model's own, the log-softmax of the logits before any sampling parameter, as in OpenAI's API.

        Raises:
            TokenIdError: token_id outside the vocabulary.
            InvalidArgumentError: top out of range, or an empty session.
        """
        check_integer("logprobs", top, self.model.vocab_size)
        logprob = ctypes.c_float()
        ids, values = (ctypes.c_int32 * top)(), (ctypes.c_float * top)()
        token = int(check_ids([token_id], self.model.vocab_size)[0])
        c.call("lococo_session_logprobs", self._open(), token, top, ctypes.byref(logprob), ids, values)
        return TokenLogprobs(token, logprob.value, dict(zip(ids, values, strict=True)))

    def generate(
        self, ids: TokenIds, params: SamplingParams | None = None, *, logprobs: list[TokenLogprobs] | None = None
    ) -> Iterator[int]:
        """Reads `ids` (may be empty to go on), then yields sampled token ids until one of the ends below.

        It ends after max_tokens tokens, an end-of-sequence token (unless ignore_eos) or a stop token, which are yielded
        too. The last token yielded has not been read into the cache: pass it at the head of the next `ids`.

        Args:
            ids: tokens to read first.
            params: without `stop`, which needs text.
            logprobs: with params.logprobs, receives an entry for every token just before that is yielded.

        Raises:
            InvalidArgumentError: params.stop is set, or only one of params.logprobs and logprobs is.
            see `prefill` and `sample`.
        """
        params = self._for_tokens(ids, params, logprobs)
        if len(ids):
            self.prefill(ids)
        return self._generate(params, logprobs)

    def _generate(self, params: SamplingParams, logprobs: list[TokenLogprobs] | None) -> Iterator[int]:
        native = self._native(params)
        token = ctypes.c_int32()
        ends = self._ends(params)
        for i in range(params.max_tokens):
            c.call("lococo_session_sample", self._open(), ctypes.byref(native), ctypes.byref(token))
            if logprobs is not None:
                logprobs.append(self.logprobs(token.value, params.logprobs or 0))
            last = token.value
            yield last
            if last in ends:
                return
            if i + 1 < params.max_tokens:
                c.call("lococo_session_step", self._open(), last)

    def _ends(self, params: SamplingParams) -> set[int]:
        """The tokens that end generation."""
        return {*params.stop_token_ids, *(() if params.ignore_eos else self.model.manifest.model.eos_token_ids)}

    def generate_all(
        self, ids: TokenIds, params: SamplingParams | None = None, *, logprobs: list[TokenLogprobs] | None = None
    ) -> list[int]:
        """The tokens of `generate` at once, in one call of the C library unless logprobs are asked for.

        Greedy decoding on a GPU then runs whole windows of steps, from one fusion to the next, as one launch.
        """
        params = self._for_tokens(ids, params, logprobs)
        if len(ids):
            self.prefill(ids)
        if logprobs is not None:
            return list(self._generate(params, logprobs))
        tokens: list[int] = []
        native = self._native(params)

        def collect(token: int, _: object) -> int:
            tokens.append(token)
            return 0  # go on

        on_token = c.TokenFn(collect)
        c.call("lococo_session_generate", self._open(), ctypes.byref(native), params.max_tokens, on_token, None, None)
        return tokens

    def _for_tokens(
        self, ids: TokenIds, params: SamplingParams | None, logprobs: list[TokenLogprobs] | None
    ) -> SamplingParams:
        """Refuses what generation would refuse, before it reads `ids`."""
        params = or_default(params)
        if params.stop:
            raise InvalidArgumentError("stop: a session has token ids and no text; use LLM, or stop_token_ids")
        if (params.logprobs is None) != (logprobs is None):
            raise InvalidArgumentError("logprobs: expected both params.logprobs and a list to fill, or neither")
        for name, named in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [i for i in named if i >= self.model.vocab_size]:
                raise InvalidArgumentError(
                    f"{name}: expected token ids from 0 to {self.model.vocab_size - 1}, got {wrong[0]}"
                )
        if (room := 2**31 - 1 - self.position - len(ids)) < params.max_tokens:
            raise InvalidArgumentError(
                f"max_tokens: expected at most {room} at this position, got {params.max_tokens}; reset the session"
            )
        return params

    def _native(self, params: SamplingParams | None, allowed_tokens: TokenMask | None = None) -> c.CSamplingParams:
        native = or_default(params).to_c()
        if allowed_tokens is not None:
            mask = np.asarray(allowed_tokens)
            if mask.dtype not in (np.uint32, np.int32) or mask.ndim != 1:
                raise InvalidArgumentError(
                    "allowed_tokens: expected 32-bit integers of one dimension (words),"
                    f" got {mask.dtype} of shape {mask.shape}"
                )
            words = np.ascontiguousarray(mask)
            native.allowed_tokens = (ctypes.c_uint32 * words.size).from_buffer_copy(words.tobytes())
            native.num_allowed_words = words.size
        return native

    def cancel(self, on: bool = True) -> None:
        """From any thread, at any time, without waiting: no further forward.

        Calls that read tokens, running or yet to come, raise CancelledError before their next forward, until
        `cancel(False)`. What has been read stays read; `position` says how much.
        """
        with self.model._lock:  # close waits
            c.call("lococo_session_cancel", self._open(), int(on))

    # --- where it stands ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens read so far."""
        value = ctypes.c_int64()
        c.call("lococo_session_position", self._open(), ctypes.byref(value))
        return value.value

    @property
    def live_slots(self) -> int:
        """Cache slots in use, at most mem_size + buffer."""
        value = ctypes.c_int32()
        c.call("lococo_session_live_slots", self._open(), ctypes.byref(value))
        return value.value

    @property
    def windows(self) -> tuple[int, float]:
        """Greedy decoding from one fusion to the next that the device ran in one go, since the session was made, reset
        or loaded: how often, and the seconds, by its own clock, that it waited for the host between windows that
        followed each other. (0, 0.0) on a CPU.
        """
        count, seconds = ctypes.c_int64(), ctypes.c_double()
        c.call("lococo_session_windows", self._open(), ctypes.byref(count), ctypes.byref(seconds))
        return count.value, seconds.value

    @property
    def state_bytes(self) -> int:
        """Exact bytes of the state, the same at every position."""
        self._open()
        return self.model.state_bytes

    @property
    def counters(self) -> dict[str, int]:
        """Forwards of one token (steps), of more (blocks), and fusions, since creation, reset or load."""
        values = [ctypes.c_int64() for _ in range(3)]
        c.call("lococo_session_counters", self._open(), *map(ctypes.byref, values))
        return dict(zip(("steps", "blocks", "fusions"), (v.value for v in values), strict=True))

    # --- state -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to an empty cache at position 0."""
        c.call("lococo_session_reset", self._open())

    def clone(self) -> Session:
        """A second session in the same state, at a cost that does not depend on history."""
        other = Session.__new__(Session)
        other._handle, other._owns_model, other.model = ctypes.c_void_p(), False, self.model
        c.call("lococo_session_clone", self._open(), ctypes.byref(other._handle))
        self.model._count(+1)
        return other

    def state(self) -> bytes:
        """The state as `save` writes it."""
        size = ctypes.c_size_t()
        c.call("lococo_session_state_size", self._open(), ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        c.call("lococo_session_state_get", self._open(), buffer, size)
        return buffer.raw

    def set_state(self, state: bytes) -> None:
        """Continues from `state`. Raises as `load`, and InvalidArgumentError where it is no bytes."""
        if not isinstance(state, bytes):
            raise InvalidArgumentError(f"state: expected bytes, got {type(state).__name__}")
        c.call("lococo_session_state_set", self._open(), state, len(state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state file, whole or not at all. Raises StorageError, NoSpaceError."""
        c.call("lococo_session_save", self._open(), c.encode_path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a state file; on an error the session is as it was.

        Raises:
            NotFoundError, StorageError: the file cannot be read.
            CorruptError: truncated or changed.
            VersionError: another state schema.
            StateMismatchError: the state of another bundle.
        """
        c.call("lococo_session_load", self._open(), c.encode_path(path))

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ClosedError("the session is closed; create a new one")
        return self._handle

    def close(self) -> None:
        """Frees the session, and the model if the session opened it. Closing twice is fine.

        Raises:
            BusyError: another thread is inside a call; nothing is freed.
        """
        if self._handle:
            with contextlib.suppress(DeadSessionError):
                _ = self.position
            if self._batch is not None:
                self._batch.remove(self)
            with self.model._lock:
                handle, self._handle = self._handle, ctypes.c_void_p()
            c.library().lococo_session_destroy(handle)
            if self._owns_model:
                self.model._closing = True
            self.model._count(-1)


def _as_ids(ids: TokenIds) -> npt.NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InvalidArgumentError(f"token ids: expected integers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise InvalidArgumentError(f"token ids: expected one dimension (T), got shape {array.shape}")
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise TokenIdError("token ids: out of the 32-bit range")
    return np.ascontiguousarray(array, np.int32)


def check_ids(ids: TokenIds, vocab_size: int, name: str = "ids") -> npt.NDArray[np.int32]:
    """Token ids as the C core takes them.

    Raises:
        EmptyPromptError, TokenIdError, InvalidArgumentError: see `Session.prefill`.
    """
    array = _as_ids(ids)
    if array.size == 0:
        raise EmptyPromptError(f"{name}: expected at least one token, got none")
    wrong = array[(array < 0) | (array >= vocab_size)]
    if wrong.size:
        raise TokenIdError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {wrong[0]}; is this the bundle's tokenizer?"
        )
    return array
