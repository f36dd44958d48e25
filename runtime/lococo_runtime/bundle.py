"""The bundle: one directory that travels from the exporter to the runtime.

`lococo.json` describes it in full (docs/bundle.md); the graphs share one file of weights. This module defines the
schema, checks it, and publishes a directory atomically. It imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ._exceptions import (
    ConfigError,
    CorruptError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    TargetExistsError,
    VersionError,
)

MANIFEST_NAME = "lococo.json"
WEIGHTS_NAME = "model.onnx.data"
FORMAT_NAME = "lococo-bundle"
SCHEMA_VERSION = 1
STATE_SCHEMA_VERSION = 2

POLICIES = ("lococo", "h2o")
ACTIVATIONS = ("none", "relu", "silu", "gelu", "tanh")
DECAY_UNITS = ("forward", "token")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}
MODEL_DTYPES = ("float32", "float16", "bfloat16")
MAX_BATCH = 1024

MAX_DIM = 1 << 24
"""The most of one axis of the model or the cache, as in the C library; a damaged file cannot ask for more memory."""
MAX_LAYERS = 4096
MAX_JSON_BYTES = 16 << 20


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class LococoConfig:
    """The slot cache: how many slots, what a fusion keeps, and when it fires. Validates once, on construction.

    M = mem_size, mc = M - keep. A forward of q tokens appends q slots; when more than M + buffer are live, a fusion
    leaves exactly M: `keep - local_len` heavy hitters and the last `local_len` slots verbatim, and mc slots mixed by
    the fusion heads (arXiv 2406.05317). With `policy` "h2o" it keeps M verbatim and mixes none (arXiv 2306.14048).
    A prompt is read in forwards of up to `block_size` tokens. The heads of a layer are `num_conv_layers` convolutions
    of width `kernel_size`, with `conv_expand` * mc channels between them, each followed by `activation`: "none",
    "relu", "silu", "gelu" or "tanh".

    Raises:
        ConfigError: naming the field, what was expected and what was given.
    """

    mem_size: int
    keep: int
    block_size: int
    policy: str = "lococo"
    local_len: int = 0
    buffer: int = 16
    kernel_size: int = 21
    num_conv_layers: int = 1
    conv_expand: int = 1
    activation: str = "relu"
    score_decay: float = 0.0
    """Scores of a forward = score_decay * old scores + this forward's. 0: last forward only, as published; 1: H2O."""
    decay_per: str = "forward"
    """"forward", or "token": a query of age a counts score_decay**a, however the tokens are cut into forwards."""

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES, f"policy: expected one of {', '.join(POLICIES)}, got {self.policy!r}")
        sizes = (
            "mem_size",
            "keep",
            "block_size",
            "local_len",
            "buffer",
            "kernel_size",
            "num_conv_layers",
            "conv_expand",
        )
        for name in sizes:
            value = getattr(self, name)
            _require(type(value) is int, f"{name}: expected an integer, got {value!r}")
            _require(value <= MAX_DIM, f"{name}: expected at most {MAX_DIM}, got {value}")
        _require(self.mem_size >= 1, f"mem_size: expected at least 1 slot, got {self.mem_size}")
        _require(self.block_size >= 1, f"block_size: expected at least 1 token, got {self.block_size}")
        _require(self.buffer >= 0, f"buffer: expected at least 0 slots, got {self.buffer}")
        _require(0 <= self.keep <= self.mem_size, f"keep: expected 0 to mem_size={self.mem_size}, got {self.keep}")
        _require(
            0 <= self.local_len <= self.keep,
            f"local_len: expected 0 to keep={self.keep} (recent slots are part of the kept ones), got {self.local_len}",
        )
        _require(
            0.0 <= self.score_decay <= 1.0, f"score_decay: expected a number from 0 to 1, got {self.score_decay!r}"
        )
        _require(
            self.decay_per in DECAY_UNITS,
            f"decay_per: expected one of {', '.join(DECAY_UNITS)}, got {self.decay_per!r}",
        )
        if self.policy == "h2o":
            _require(
                self.keep == self.mem_size,
                f"keep: policy h2o keeps every slot verbatim, expected {self.mem_size}, got {self.keep}",
            )
            return
        _require(
            self.num_mixed >= 1,
            f"no mixed slot is left: mem_size={self.mem_size} and keep={self.keep} give 0: "
            "mem_size * (1 - hh_keep_rate) is truncated, so raise mem_size or lower the keep rate, or use policy h2o",
        )
        _require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"kernel_size: expected an odd number (the convolution keeps its length), got {self.kernel_size}",
        )
        _require(self.num_conv_layers >= 1, f"num_conv_layers: expected at least 1, got {self.num_conv_layers}")
        _require(self.conv_expand >= 1, f"conv_expand: expected at least 1, got {self.conv_expand}")
        _require(
            self.activation in ACTIVATIONS,
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}",
        )

    @classmethod
    def from_rate(cls, mem_size: int, hh_keep_rate: float, block_size: int, **other: Any) -> LococoConfig:
        """From the published hyper-parameters: mc = int(M * (1 - r)), which truncates; keep = M - mc."""
        if not (isinstance(hh_keep_rate, (int, float)) and 0.0 <= hh_keep_rate <= 1.0):
            raise ConfigError(f"hh_keep_rate: expected a number from 0 to 1, got {hh_keep_rate!r}")
        _require(type(mem_size) is int and mem_size >= 1, f"mem_size: expected at least 1 slot, got {mem_size!r}")
        return cls(
            mem_size=mem_size, keep=mem_size - int(mem_size * (1 - hh_keep_rate)), block_size=block_size, **other
        )

    @classmethod
    def h2o(cls, mem_size: int, block_size: int, buffer: int = 16) -> LococoConfig:
        """Heavy hitters by accumulated score and recent tokens, half and half (arXiv 2306.14048, section 4)."""
        return cls(
            mem_size=mem_size,
            keep=mem_size,
            block_size=block_size,
            policy="h2o",
            local_len=mem_size // 2,
            buffer=buffer,
            score_decay=1.0,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `decay_per` "forward" is left out: bundles older than the field keep their identity."""
        fields = dataclasses.asdict(self)
        if self.decay_per == "forward":
            del fields["decay_per"]
        return fields

    @property
    def num_mixed(self) -> int:
        """mc: slots made by the fusion heads."""
        return self.mem_size - self.keep

    @property
    def capacity(self) -> int:
        """The most slots that are live between forwards, M + buffer."""
        return self.mem_size + self.buffer


@dataclass(frozen=True)
class ModelGeometry:
    """The decoder's shape. `rope` holds the type ("default", "linear", "llama3", "yarn"), theta and its parameters."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict[str, Any]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, f"{name}: expected a positive integer, got {value!r}")
            limit = MAX_LAYERS if name == "num_layers" else MAX_DIM
            _require(value <= limit, f"{name}: expected at most {limit}, got {value}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim: rotary embedding needs an even number, got {self.head_dim}")
        _require(isinstance(self.rope, dict), f"rope: expected an object, got {self.rope!r}")
        ids = self.eos_token_ids
        _require(
            isinstance(ids, list) and all(type(i) is int for i in ids), f"eos_token_ids: expected integers, got {ids!r}"
        )


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of fixed shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file. kind: "decoder" (a forward of up to `tokens` tokens), "fusion" (what may follow it), "lm_head".

    batch: sequences that it reads tokens of; more than 1 only for the decoder that steps a batch of sessions.
    """

    kind: str
    tokens: int
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.tokens}" + (f"_batch_{self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, relative to it."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`lococo.json`, whole.

    Attributes:
        producer: the program that wrote it, and its version.
        model: the geometry of the network.
        cache: the slot cache.
        dtype: of weights and slots: "float32", "float16" or "bfloat16".
        batch_size: of a state, always 1.
        graphs: every ONNX graph, with its inputs and outputs.
        files: path, bytes and sha256 of every file but the manifest.
        tokenizer: which of the files hold tokenizer and chat template; None without them.
        provenance: what it was made from, for people.
    """

    producer: str
    model: ModelGeometry
    cache: LococoConfig
    dtype: str
    batch_size: int
    graphs: tuple[GraphSpec, ...]
    files: tuple[FileEntry, ...]
    tokenizer: dict[str, Any] | None
    provenance: dict[str, Any]

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """The tensors of a state, in its order."""
        return state_tensors(self.model, self.cache, self.dtype, self.batch_size)

    @property
    def state_bytes(self) -> int:
        """Exact bytes of a state, the same at every position; a state file has 88 more."""
        return sum(t.nbytes for t in self.state)

    @property
    def max_batch(self) -> int:
        """Sessions that can be stepped together, 1 if the bundle was exported without `--batch`."""
        return max((g.batch for g in self.graphs), default=1)

    @property
    def bundle_id(self) -> str:
        """sha256 over everything that gives a state its meaning: geometry, cache, dtype, batch, and the weights."""
        weights = next((f.sha256 for f in self.files if f.path == WEIGHTS_NAME), "")
        identity = {
            "state_schema_version": STATE_SCHEMA_VERSION,
            "model": dataclasses.asdict(self.model),
            "cache": self.cache.as_dict(),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "weights_sha256": weights,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The exact bytes of `lococo.json` (UTF-8): two-space indent, fixed key order, one newline at the end."""
        cache = self.cache.as_dict()
        document = {
            "format": FORMAT_NAME,
            "schema_version": SCHEMA_VERSION,
            "producer": self.producer,
            "bundle_id": self.bundle_id,
            "model": dataclasses.asdict(self.model),
            "cache": {**cache, "num_mixed": self.cache.num_mixed, "capacity": self.cache.capacity},
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "state": {
                "schema_version": STATE_SCHEMA_VERSION,
                "nbytes": self.state_bytes,
                "tensors": [_tensor_json(t) for t in self.state],
            },
            "graphs": [
                {
                    "name": g.name,
                    "kind": g.kind,
                    "tokens": g.tokens,
                    **({"batch": g.batch} if g.batch > 1 else {}),
                    "file": g.file,
                    "inputs": [_tensor_json(t) for t in g.inputs],
                    "outputs": [_tensor_json(t) for t in g.outputs],
                }
                for g in self.graphs
            ],
            "files": [dataclasses.asdict(f) for f in self.files],
            "tokenizer": self.tokenizer,
            "provenance": self.provenance,
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> Manifest:
        """Parses and checks a manifest.

        Raises:
            CorruptError: not JSON, a missing field, or a derived field that contradicts the rest.
            VersionError: a schema version this release does not know.
        """
        d = parse_json(text, source, "export the bundle again")
        if not isinstance(d, dict) or d.get("format") != FORMAT_NAME:
            raise CorruptError(f'{source}: expected "format": "{FORMAT_NAME}"; this is not a bundle manifest')
        state = d.get("state")
        for name, holder, expected in (("", d, SCHEMA_VERSION), ("state.", state, STATE_SCHEMA_VERSION)):
            found = holder.get("schema_version") if isinstance(holder, dict) else None
            if found != expected:
                raise VersionError(
                    f"{source}: {name}schema_version: expected {expected}, got {found!r};"
                    " export the bundle again with this release, or install the release that wrote it"
                )
        try:
            manifest = cls(
                producer=d["producer"],
                model=_dataclass_from(ModelGeometry, d["model"]),
                cache=_dataclass_from(LococoConfig, d["cache"]),
                dtype=check_model_dtype(d["dtype"]),
                batch_size=_of_type(int, d["batch_size"]),
                graphs=tuple(
                    GraphSpec(
                        _of_type(str, g["kind"]),
                        _of_type(int, g["tokens"]),
                        _of_type(str, g["file"]),
                        tuple(_tensor_from(t) for t in g["inputs"]),
                        tuple(_tensor_from(t) for t in g["outputs"]),
                        g.get("batch", 1),
                    )
                    for g in d["graphs"]
                ),
                files=tuple(
                    FileEntry(_of_type(str, f["path"]), _of_type(int, f["nbytes"]), _of_type(str, f["sha256"]))
                    for f in d["files"]
                ),
                tokenizer=d["tokenizer"],
                provenance=d["provenance"],
            )
            consistent = (
                manifest.bundle_id == d["bundle_id"]
                and [_tensor_json(t) for t in manifest.state] == d["state"]["tensors"]
                and d["state"]["nbytes"] == manifest.state_bytes
            )
        except (KeyError, TypeError, AttributeError, ConfigError, InvalidArgumentError) as e:
            raise CorruptError(f"{source}: malformed manifest: {type(e).__name__}: {e}") from e
        if not consistent:
            raise CorruptError(f"{source}: bundle_id or state contradict the rest of the manifest; it was edited")
        return manifest


_T = TypeVar("_T")


def _dataclass_from(kind: type[_T], values: dict[str, Any]) -> _T:
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in values.items() if k in names})


def _tensor_json(t: TensorSpec) -> dict[str, Any]:
    return {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "nbytes": t.nbytes}


def _tensor_from(d: dict[str, Any]) -> TensorSpec:
    tensor = TensorSpec(_of_type(str, d["name"]), tuple(_of_type(int, n) for n in d["shape"]), d["dtype"])
    if tensor.dtype not in DTYPE_BYTES or min(tensor.shape, default=1) < 1:
        raise TypeError(f"tensor {tensor.name}: unknown dtype {tensor.dtype!r} or empty shape {list(tensor.shape)}")
    return tensor


def _of_type(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


# --- the tensors of state and graphs -------------------------------------------------------------------------------


def cache_tensors(prefix: str, model: ModelGeometry, batch: int, slots: int, dtype: str) -> list[TensorSpec]:
    """K and V of every layer: `{prefix}.{layer}.key` and `.value`, (batch, num_kv_heads, slots, head_dim)."""
    shape = (batch, model.num_kv_heads, slots, model.head_dim)
    return [TensorSpec(f"{prefix}.{i}.{kv}", shape, dtype) for i in range(model.num_layers) for kv in ("key", "value")]


def score_tensors(prefix: str, model: ModelGeometry, batch: int, slots: int) -> list[TensorSpec]:
    """Scores of every layer: `{prefix}.{layer}`, (batch, num_kv_heads, slots), float32 whatever the model's dtype."""
    return [TensorSpec(f"{prefix}.{i}", (batch, model.num_kv_heads, slots), "float32") for i in range(model.num_layers)]


def state_tensors(model: ModelGeometry, cache: LococoConfig, dtype: str, batch: int) -> tuple[TensorSpec, ...]:
    """All that a session must remember, in the order of the state file.

    `position` counts the tokens read, `past_length` the live slots; `logits` are those after the last token. Scores are
    state only where they accumulate (score_decay > 0): otherwise they are used at once, if a fusion follows, or never.
    `token_counts` is what sampling penalties see: 0 for a token never read, else 1 + its count since generation began.
    """
    tensors = [
        TensorSpec("position", (batch,), "int64"),
        TensorSpec("past_length", (batch,), "int64"),
        TensorSpec("logits", (batch, model.vocab_size), "float32"),
        *cache_tensors("past_key_values", model, batch, cache.capacity, dtype),
    ]
    if cache.score_decay > 0:
        tensors += score_tensors("past_scores", model, batch, cache.capacity)
    return (*tensors, TensorSpec("token_counts", (batch, model.vocab_size), "int32"))


def forward_widths(block_size: int) -> tuple[int, ...]:
    """Token counts a decoder graph exists for: one, a short block for short prompts and tails, a whole block."""
    return tuple(sorted({1, min(32, block_size), block_size}))


def check_batch(batch: int) -> int:
    """Returns `batch` if a bundle can step that many sessions together."""
    if not (type(batch) is int and 1 <= batch <= MAX_BATCH):
        raise InvalidArgumentError(f"batch: expected 1 (no batched graph) to {MAX_BATCH} sessions, got {batch!r}")
    return batch


def graph_specs(model: ModelGeometry, cache: LococoConfig, dtype: str, batch: int) -> tuple[GraphSpec, ...]:
    """Every graph of a bundle with its inputs and outputs; docs/bundle.md explains them.

    All are of one sequence; a `batch` of more than 1 adds a decoder of one token that steps as many at once.
    """
    specs: list[GraphSpec] = []
    length = TensorSpec("past_length", (1,), "int32")
    state_kv = cache_tensors("past_key_values", model, 1, cache.capacity, dtype)
    for width in forward_widths(cache.block_size):
        num_tokens = [TensorSpec("num_tokens", (1,), "int32")] if width > 1 else []
        specs.append(_decoder_spec(model, cache, dtype, 1, width))
        specs.append(
            GraphSpec(
                "fusion",
                width,
                f"fusion_{width}.onnx",
                # after a single-token step a fusion always sees capacity + 1 live slots, so it needs no lengths
                (
                    *([length, *num_tokens] if width > 1 else []),
                    *state_kv,
                    *cache_tensors("new_key_values", model, 1, width, dtype),
                    *score_tensors("scores", model, 1, cache.capacity + width),
                ),
                (
                    *cache_tensors("present", model, 1, cache.capacity, dtype),
                    *(score_tensors("present_scores", model, 1, cache.capacity) if cache.score_decay > 0 else []),
                ),
            )
        )
    if cache.block_size > 1:
        width = cache.block_size
        specs.append(
            GraphSpec(
                "lm_head",
                width,
                f"lm_head_{width}.onnx",
                (TensorSpec("hidden_states", (1, width, model.hidden_size), dtype),),
                (TensorSpec("logits", (1, width, model.vocab_size), "float32"),),
            )
        )
    if batch > 1:
        specs.append(_decoder_spec(model, cache, dtype, batch, 1))
    return tuple(specs)


def _decoder_spec(model: ModelGeometry, cache: LococoConfig, dtype: str, batch: int, width: int) -> GraphSpec:
    hidden = [TensorSpec("hidden_states", (batch, width, model.hidden_size), dtype)] if width > 1 else []
    return GraphSpec(
        "decoder",
        width,
        f"decoder_{width}_batch_{batch}.onnx" if batch > 1 else f"decoder_{width}.onnx",
        (
            TensorSpec("input_ids", (batch, width), "int32"),
            TensorSpec("position_ids", (batch,), "int32"),
            TensorSpec("past_length", (batch,), "int32"),
            *([TensorSpec("num_tokens", (batch,), "int32")] if width > 1 else []),
            *cache_tensors("past_key_values", model, batch, cache.capacity, dtype),
            *(score_tensors("past_scores", model, batch, cache.capacity) if cache.score_decay > 0 else []),
        ),
        (
            TensorSpec("logits", (batch, model.vocab_size), "float32"),
            *hidden,
            *cache_tensors("new_key_values", model, batch, width, dtype),
            *score_tensors("scores", model, batch, cache.capacity + width),
        ),
        batch,
    )


# --- reading and publishing ----------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(root: Path, name: str) -> FileEntry:
    """Size and sha256 of root/name."""
    path = root / name
    return FileEntry(name, path.stat().st_size, sha256_file(path))


def read_bounded(path: Path) -> str:
    """The text of a file, or so much of it that `parse_json` refuses it. Raises OSError, UnicodeDecodeError."""
    # without waiting: a pipe that nobody writes to would never open
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
        return f.read(MAX_JSON_BYTES + 1).decode("utf-8")


def parse_json(text: str, source: str, advice: str, *, allow_nan: bool = False) -> Any:
    """The JSON document in `text`, which anybody may have written; `allow_nan` lets NaN and infinity pass.

    Raises:
        CorruptError: more than 16 MiB, no JSON, nested too deep, or with what JSON or UTF-8 cannot hold: NaN, infinity,
            half a surrogate pair.
    """
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"expected at most {MAX_JSON_BYTES} characters")
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False, allow_nan=allow_nan).encode()
    except (ValueError, RecursionError) as e:
        raise CorruptError(f"{source}: not valid JSON: {e}; {advice}") from e
    return document


def read_manifest(bundle: str | os.PathLike[str]) -> Manifest:
    """The checked manifest of a bundle directory; files are not opened.

    Raises:
        NotFoundError, StorageError: no such directory, or no manifest in it; it cannot be read.
        CorruptError, VersionError: see `Manifest.from_json`.
    """
    path = Path(bundle) / MANIFEST_NAME
    try:
        text = read_bounded(path)
    except NotADirectoryError as e:
        raise NotFoundError(f"{bundle}: expected a bundle directory as written by lococo-export, got a file") from e
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found; expected a bundle directory as written by lococo-export") from e
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise CorruptError(f"{path}: not UTF-8 text: {e}") from e
    return Manifest.from_json(text, str(path))


def storage_error(e: OSError, path: str | os.PathLike[str]) -> StorageError:
    """Our error for an OSError of the operating system on `path`."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"{path}: no space left on the disk; free some or choose another target")
    return StorageError(f"{path}: {e.strerror or e}; check that the target is writable")


@contextlib.contextmanager
def publish_directory(
    target: str | os.PathLike[str], *, force: bool = False, marker: str = MANIFEST_NAME
) -> Iterator[Path]:
    """Yields a staging directory beside `target`; on success it is fsynced and renamed to `target` under a lock.

    On any exception the staging directory is removed and `target` is as it was.

    Raises:
        TargetExistsError: `target` exists and `force` is not given, or it has no file `marker` (never replaced).
        StorageError, NoSpaceError: read-only target, full disk.
    """
    target = Path(target).absolute()
    _check_replaceable(target, force, marker)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o755)
        yield staging
        _fsync_tree(staging)
        with _locked(target.parent / f".{target.name}.lock"):
            _check_replaceable(target, force, marker)
            if not (target.exists() and _exchange(staging, target)):
                if target.exists():
                    os.replace(target, f"{staging}.old")
                os.replace(staging, target)
                shutil.rmtree(f"{staging}.old", ignore_errors=True)
            _fsync(target.parent)
    except OSError as e:
        if isinstance(e, StorageError | NotFoundError):
            raise
        raise storage_error(e, target) from e
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(target: Path, force: bool, marker: str) -> None:
    if not target.exists():
        return
    if not force:
        raise TargetExistsError(f"{target}: already exists; pass --force to replace it, or choose another target")
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).exists()):
        raise TargetExistsError(f"{target}: exists and has no {marker}; refusing to replace it even with --force")


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step, so that no reader finds neither; False where the system cannot."""
    libc = ctypes.CDLL(None)
    current_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        hasattr(libc, "renameat2")
        and libc.renameat2(current_directory, os.fsencode(a), current_directory, os.fsencode(b), exchange) == 0
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            _fsync(Path(directory) / name)
        _fsync(Path(directory))


def producer(tool: str) -> str:
    """The tool's name with this distribution's version; the name alone in a source tree that is not installed."""
    try:
        return f"{tool} {importlib.metadata.version('lococo-export')}"
    except importlib.metadata.PackageNotFoundError:
        return tool


def check_model_dtype(dtype: str) -> str:
    """Returns `dtype` if a bundle can have it."""
    if dtype not in MODEL_DTYPES:
        raise InvalidArgumentError(f"dtype: expected one of {', '.join(MODEL_DTYPES)}, got {dtype!r}")
    return dtype
