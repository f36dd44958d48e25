"""Reading checkpoints: a Hugging Face model directory, with fusion heads in one of two formats, or without.

- "lococo-merged": what the LoCoCo research code saves after merging. The heads are among the model's tensors, as
  `model.layers.{i}.self_attn.memory_saver.normalizer` and `.memory_saver.layers.{j}.weight` and `.bias`; part of the
  hyper-parameters cannot be read off them and comes as arguments.
- "lococo-heads": an unchanged model directory and two files beside it. `lococo_heads.safetensors` holds
  `layers.{i}.normalizer` (1,), `layers.{i}.conv.{j}.weight` (out, in, kernel) and `layers.{i}.conv.{j}.bias` (out,);
  `lococo_config.json` holds the fields of `LococoConfig`, and `"format": "lococo-heads"`, `"schema_version": 1`.
- "plain": a model without heads, for policy "h2o".

Weights are read one tensor at a time, memory-mapped; nothing here ever holds a whole model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lococo_runtime._exceptions import (
    CheckpointError,
    ConfigError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedModelError,
    VersionError,
)
from lococo_runtime.bundle import LococoConfig, ModelGeometry, parse_json, read_bounded, storage_error
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .rope import inverse_frequencies

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FORMATS = ("lococo-merged", "lococo-heads", "plain")
HEADS_NAME = "lococo_heads.safetensors"
HEADS_CONFIG_NAME = "lococo_config.json"
HEADS_SCHEMA_VERSION = 1

DEFAULT_KEEP_RATE = 0.5
"""Hyper-parameters of the published runs (arXiv 2406.05317); local_len 0, ReLU, buffer 16, block M."""
DEFAULT_BUFFER = 16
DEFAULT_H2O_SLOTS = 512
MAX_ABS_BIAS = 1e3
"""Conv biases beyond this are taken for uninitialised memory: trained ones are of order 1, and a constant added to all
positions of a slot cancels in its softmax, so that nothing drives them up."""
MAX_LISTED = 20

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMBER = "(0|[1-9][0-9]{0,3})"  # int() takes more: leading zeros, other scripts' digits, and no more than 4300
_MERGED_HEAD = re.compile(
    rf"model\.layers\.{_NUMBER}\.self_attn\.memory_saver\.(?:(normalizer)|layers\.{_NUMBER}\.(weight|bias))"
)
_OUR_HEAD = re.compile(rf"layers\.{_NUMBER}\.(?:(normalizer)|conv\.{_NUMBER}\.(weight|bias))")


@dataclass(frozen=True)
class HeadWeights:
    """The fusion heads of one decoder layer, shared by its attention heads."""

    normalizer: float
    """n: 0 copies the best of the evicted slots, 1 mixes all of them."""
    convs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(weight (out, in, kernel), bias (out,)) of each Conv1d, first to last; in = 2 * head_dim, last out = mc."""


class TensorMap(Mapping[str, torch.Tensor]):
    """Tensors by name, each read when asked for; shapes and dtypes are known without reading."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self._entries = dict(sorted(entries.items()))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entries[name].load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype | str:
        """The stored dtype; a string where torch's name for it is not known or not accepted."""
        return self._entries[name].dtype

    def file(self, name: str) -> Path:
        return self._entries[name].file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(
            math.prod(e.shape) * e.dtype.itemsize for e in self._entries.values() if isinstance(e.dtype, torch.dtype)
        )


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    loaded: torch.Tensor | None = None  # pickled files only: already mapped by torch.load

    def load(self, name: str) -> torch.Tensor:
        if self.loaded is not None:
            return self.loaded
        # opened anew for every tensor: its pages leave memory with the tensor, not with the file
        try:
            with safe_open(str(self.file), framework="pt") as f:
                tensor: torch.Tensor = f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CorruptError(f"{self.file}: reading {name}: {e}; it changed after it was opened") from e
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint, its large tensors still on disk.

    `tensors` holds the model's own weights under their Hugging Face names ("model.layers.0.self_attn.q_proj.weight"),
    without the heads, and without `lm_head.weight` where it is tied to the embedding. `heads` has one entry a layer for
    policy "lococo" and none for "h2o". `heads_ignored` records that the checkpoint has heads the policy does not use.
    `geometry` is the network's, `config` the slot cache's; `format` names the kind of checkpoint found in `source_dir`.
    `sliding_window` is how many tokens the model itself looks back, where that is limited.
    """

    geometry: ModelGeometry
    config: LococoConfig
    tensors: TensorMap
    heads: tuple[HeadWeights, ...]
    source_dir: Path
    format: str
    heads_ignored: bool = False
    sliding_window: int | None = None

    @property
    def dtype(self) -> str:
        """That of the embedding, which stands for the model's: "float32", "float16" or "bfloat16"."""
        stored = self.tensors.dtype("model.embed_tokens.weight")
        return _DTYPES[stored] if isinstance(stored, torch.dtype) else stored


@dataclass(frozen=True)
class _Flags:
    """The hyper-parameters as given by the caller; None where not given."""

    policy: str | None
    mem_size: int | None
    hh_keep_rate: float | None
    local_len: int | None
    block_size: int | None
    activation: str | None
    buffer: int | None


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    policy: str | None = None,
    mem_size: int | None = None,
    hh_keep_rate: float | None = None,
    local_len: int | None = None,
    block_size: int | None = None,
    activation: str | None = None,
    buffer: int | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Reads and checks a checkpoint directory in any of the three formats (see the module).

    Hyper-parameters left at None take what the checkpoint says, else the published defaults: keep rate 0.5, no local
    slots, ReLU, buffer 16, a block of M tokens. For policy "h2o" on a plain model: 512 slots, a block of at most 512.
    `allow_pickle` lets `pytorch_model.bin` be read, with `torch.load(weights_only=True)`.

    Raises:
        NotFoundError: the directory, `config.json` or the weights are not there.
        UnsupportedModelError: an architecture or option that is not supported.
        ConfigError: hyper-parameters that contradict each other, the tensors, or the stored configuration.
        CheckpointError: missing, unexpected, wrongly shaped or non-finite tensors, each named.
        CorruptError: a truncated or malformed file.
        VersionError: a `lococo_config.json` of a later release.
        InvalidArgumentError: pickled weights without `allow_pickle`.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotFoundError(f"{root}: expected a model directory with config.json; download the model first")
    if policy not in (None, "lococo", "h2o"):
        raise ConfigError(f"policy: expected lococo or h2o, got {policy!r}")
    flags = _Flags(policy, mem_size, hh_keep_rate, local_len, block_size, activation, buffer)
    geometry, window = _read_geometry(root)
    entries = _weight_entries(root, allow_pickle)
    _refuse_lora(root, entries)

    merged = {n: entries.pop(n) for n in list(entries) if ".memory_saver." in n}
    ours = (root / HEADS_NAME).exists() or (root / HEADS_CONFIG_NAME).exists()
    if merged and ours:
        raise CheckpointError(f"{root}: heads twice, in {HEADS_NAME} and as memory_saver tensors; remove one of them")
    problems: list[str] = []
    _check_model(geometry, entries, problems)
    heads: tuple[HeadWeights, ...] = ()
    if merged:
        names = _head_names(merged, _MERGED_HEAD, geometry, problems)
        heads, stride = _read_heads(TensorMap(merged), names, geometry, problems)
        _raise_problems(root, problems)
        cache, kind = _merged_config(flags, heads, stride), "lococo-merged"
    elif ours:
        stored = _read_heads_config(root / HEADS_CONFIG_NAME)
        head_entries = _safetensors_entries(root / HEADS_NAME)
        names = _head_names(head_entries, _OUR_HEAD, geometry, problems)
        heads, _ = _read_heads(TensorMap(head_entries), names, geometry, problems)
        _raise_problems(root, problems)
        _check_heads_fit(stored, heads, HEADS_CONFIG_NAME)
        cache, kind = _stored_config(flags, stored), "lococo-heads"
    else:
        _raise_problems(root, problems)
        if policy != "h2o":
            raise ConfigError(
                f"{root}: a model without fusion heads; expected them among its tensors (memory_saver) or in"
                f" {HEADS_NAME}. Fit heads for it first, or pass --policy h2o, which keeps heavy hitters and recent"
                " tokens and mixes none"
            )
        cache, kind = _h2o_config(flags), "plain"
    _check_window(window, cache)
    tensors = TensorMap(entries)
    _check_finite(root, tensors)
    ignored = bool(heads) and cache.policy == "h2o"
    return Checkpoint(geometry, cache, tensors, () if ignored else heads, root, kind, ignored, window)


# --- config.json ------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(read_bounded(path), str(path), "download or write it again", allow_nan=True)
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found; expected a Hugging Face model directory") from e
    except OSError as e:
        raise storage_error(e, path) from e
    except UnicodeDecodeError as e:
        raise CorruptError(f"{path}: not valid JSON: {e}; download or write it again") from e
    if not isinstance(document, dict):
        raise CorruptError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _read_geometry(root: Path) -> tuple[ModelGeometry, int | None]:
    """The geometry, and the sliding window in tokens if the model uses one."""
    path = root / "config.json"
    c = _read_json(path)
    family = c.get("model_type")
    supported = f"supported are {', '.join(FAMILIES)}"
    if family not in FAMILIES:
        raise UnsupportedModelError(f"{path}: model_type {family!r} is not supported; {supported}")
    if c.get("quantization_config"):
        raise UnsupportedModelError(f"{path}: quantization_config: expected plain fp32, fp16 or bf16 weights")
    for name in ("num_local_experts", "num_experts"):
        if c.get(name):
            raise UnsupportedModelError(f"{path}: {name}={c[name]}: mixtures of experts are not supported; {supported}")
    if c.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{path}: hidden_act: expected 'silu', got {c['hidden_act']!r}")

    def integer(name: str, default: int | None = None) -> int:
        return _integer(c, name, path, default)

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    if c.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise CorruptError(f"{path}: head_dim is not given and hidden_size={hidden} is no multiple of {heads} heads")
    eps = c.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise CorruptError(f"{path}: rms_norm_eps: expected a small number, got {eps!r}")
    # mistral and qwen2 ignore attention_bias, only llama reads mlp_bias: as transformers builds them
    bias = bool(c.get("attention_bias", False)) and family in ("llama", "qwen3")
    generation = _read_json(root / "generation_config.json") if (root / "generation_config.json").exists() else {}
    head_dim = integer("head_dim", hidden // max(heads, 1))
    rope = _read_rope(c, path)
    try:
        geometry = ModelGeometry(
            family=family,
            vocab_size=integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_layers=integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=integer("num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            rope=rope,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=bool(c.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            bos_token_id=_first(_token_ids(generation, c, "bos_token_id", path)),
            eos_token_ids=_token_ids(generation, c, "eos_token_id", path),
        )
        inverse_frequencies(rope, head_dim)  # refuses what it cannot do
    except (ConfigError, UnsupportedModelError) as e:
        raise type(e)(f"{path}: {e}") from e
    return geometry, _read_window(c, family, path)


def _integer(c: dict[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = c.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise CorruptError(f"{path}: {name}: expected an integer, got {value!r}")
    return value


def _token_ids(generation: dict[str, Any], config: dict[str, Any], name: str, path: Path) -> list[int]:
    value = generation.get(name)
    value = config.get(name) if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise CorruptError(f"{path}: {name}: expected an integer or a list of them, got {value!r}")
    return ids


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None


def _read_rope(c: dict[str, Any], path: Path) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`, as one dict with type and theta."""
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CorruptError(f"{path}: rope_parameters: expected an object, got {given!r}")
    if any(isinstance(v, dict) for v in given.values()):
        raise UnsupportedModelError(f"{path}: rope_parameters that differ between layers are not supported")
    rope: dict[str, Any] = {
        "type": given.get("rope_type") or given.get("type") or "default",
        "theta": given.get("rope_theta") or c.get("rope_theta") or 10000.0,
    }
    named = ("type", "rope_type", "rope_theta")
    rope.update({k: v for k, v in sorted(given.items()) if k not in named and v is not None})
    if c.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", c["partial_rotary_factor"])
    if rope["type"] in ("llama3", "yarn"):
        limit = c.get("max_position_embeddings")
        if c.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        elif limit is not None:
            rope.setdefault("original_max_position_embeddings", limit)
        if "factor" not in rope and rope["type"] == "yarn" and limit and rope.get("original_max_position_embeddings"):
            rope["factor"] = limit / rope["original_max_position_embeddings"]
    return rope


def _read_window(c: dict[str, Any], family: str, path: Path) -> int | None:
    if family == "llama" or (family != "mistral" and not c.get("use_sliding_window", False)):
        return None  # llama has none, whatever config.json says
    if c.get("sliding_window", 4096) is None:
        return None
    if family != "mistral":
        after = _integer(c, "max_window_layers", path, 28)
        kinds = c.get("layer_types") or ["sliding_attention"] * (_integer(c, "num_hidden_layers", path) - after)
        if "sliding_attention" not in kinds:
            return None
    return _integer(c, "sliding_window", path, 4096)  # 4096: transformers' default where the key is absent


def _check_window(window: int | None, cache: LococoConfig) -> None:
    columns = cache.capacity + cache.block_size
    if window is not None and window < columns:
        raise UnsupportedModelError(
            f"sliding_window={window}: a forward sees up to {columns} columns (mem_size + buffer + block_size), which a"
            " window that short would cut off; lower --mem-size or --block-size, or use a model without sliding window"
        )


# --- weight files -----------------------------------------------------------------------------------------------------


def _weight_entries(root: Path, allow_pickle: bool) -> dict[str, _Entry]:
    if (root / "model.safetensors").exists():
        return _safetensors_entries(root / "model.safetensors")
    index = root / "model.safetensors.index.json"
    if index.exists():
        return _sharded_entries(root, index, _safetensors_entries)
    pickles = [root / "pytorch_model.bin", root / "pytorch_model.bin.index.json"]
    found = next((p for p in pickles if p.exists()), None)
    if found is None:
        if (root / "adapter_model.safetensors").exists() or (root / "adapter_model.bin").exists():
            raise CheckpointError(f"{root}: only a LoRA adapter; merge it into its base model first")
        raise NotFoundError(f"{root}: expected model.safetensors or model.safetensors.index.json; found neither")
    if not allow_pickle:
        raise InvalidArgumentError(
            f"{found}: pickled weights can run code when loaded; convert them to safetensors, or pass --allow-pickle if"
            " you trust their source"
        )
    if found.suffix == ".json":
        return _sharded_entries(root, found, _pickle_entries)
    return _pickle_entries(found)


def _safetensors_entries(path: Path) -> dict[str, _Entry]:
    entries = {}
    try:
        with safe_open(str(path), framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a mapping
                view = f.get_slice(name)
                stored = view.get_dtype()
                entries[name] = _Entry(path, tuple(view.get_shape()), _STORED_DTYPES.get(stored, stored))
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found") from e
    except SafetensorError as e:
        raise CorruptError(f"{path}: not a whole safetensors file: {e}; download or write it again") from e
    except OSError as e:
        raise storage_error(e, path) from e
    return entries


def _pickle_entries(path: Path) -> dict[str, _Entry]:
    if not path.exists():
        raise NotFoundError(f"{path}: not found")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as e:
        raise CorruptError(f"{path}: not weights that torch.load(weights_only=True, mmap=True) reads: {e}") from e
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise CorruptError(f"{path}: expected a state dict of tensors")
    return {
        name: _Entry(path, tuple(t.shape), t.dtype if t.dtype in _DTYPES else str(t.dtype), t)
        for name, t in loaded.items()
    }


def _sharded_entries(root: Path, index: Path, read: Any) -> dict[str, _Entry]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CorruptError(f"{index}: weight_map: expected an object of tensor names and file names")
    entries: dict[str, _Entry] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CorruptError(f"{index}: weight_map: expected names of files beside it, got {file!r}")
        shard: dict[str, _Entry] = read(root / file)
        problems += [f"{n}: missing from {file}" for n in weight_map if weight_map[n] == file and n not in shard]
        problems += [f"{n}: in {file}, but not in {index.name}" for n in shard if weight_map.get(n) != file]
        entries.update((n, e) for n, e in shard.items() if weight_map.get(n) == file)
    _raise_problems(root, problems)
    return entries


def _refuse_lora(root: Path, names: Mapping[str, object]) -> None:
    lora = sorted(n for n in names if n.startswith("base_model.model.") or ".lora_A." in n or ".lora_B." in n)
    if lora:
        raise CheckpointError(
            f"{root}: {len(lora)} tensor(s) of an unmerged LoRA training state, {lora[0]} among them; merge the"
            " adapters into the model first (merge_and_unload in peft) and save that"
        )


# --- checks -----------------------------------------------------------------------------------------------------------


def _raise_problems(root: Path, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  {p}" for p in problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(f"{root}: {len(problems)} problem(s) with its tensors:{listed}{more}")


def expected_tensors(g: ModelGeometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model, under their Hugging Face names; a linear weight is (out, in)."""
    q, kv = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (g.vocab_size, g.hidden_size)}

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for i in range(g.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (g.hidden_size,)
        linear(f"{layer}.self_attn.q_proj", q, g.hidden_size, g.qkv_bias)
        linear(f"{layer}.self_attn.k_proj", kv, g.hidden_size, g.qkv_bias)
        linear(f"{layer}.self_attn.v_proj", kv, g.hidden_size, g.qkv_bias)
        linear(f"{layer}.self_attn.o_proj", g.hidden_size, q, g.output_bias)
        if g.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (g.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (g.head_dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (g.hidden_size,)
        linear(f"{layer}.mlp.gate_proj", g.intermediate_size, g.hidden_size, g.mlp_bias)
        linear(f"{layer}.mlp.up_proj", g.intermediate_size, g.hidden_size, g.mlp_bias)
        linear(f"{layer}.mlp.down_proj", g.hidden_size, g.intermediate_size, g.mlp_bias)
    shapes["model.norm.weight"] = (g.hidden_size,)
    if not g.tie_word_embeddings:
        shapes["lm_head.weight"] = (g.vocab_size, g.hidden_size)
    return shapes


def _check_model(g: ModelGeometry, entries: dict[str, _Entry], problems: list[str]) -> None:
    """Names, shapes and dtypes; removes buffers and a tied lm_head from `entries`."""
    for name in [n for n in entries if n.endswith("rotary_emb.inv_freq")]:
        del entries[name]  # a buffer that old releases saved; config.json says the same
    if g.tie_word_embeddings and "lm_head.weight" in entries and "model.embed_tokens.weight" in entries:
        head, embedding = entries.pop("lm_head.weight"), entries["model.embed_tokens.weight"]
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        if not same or not torch.equal(head.load("lm_head.weight"), embedding.load("model.embed_tokens.weight")):
            problems.append("lm_head.weight: differs from the embedding, but config.json says tie_word_embeddings")
    expected = expected_tensors(g)
    problems += [f"{n}: missing, expected shape {list(s)}" for n, s in expected.items() if n not in entries]
    problems += [f"{n}: unexpected in a {g.family} model" for n in sorted(entries) if n not in expected]
    for name, shape in expected.items():
        if name in entries and entries[name].shape != shape:
            problems.append(f"{name}: expected shape {list(shape)}, got {list(entries[name].shape)}")
    problems += _dtype_problems({n: e for n, e in entries.items() if n in expected})


def _dtype_problems(entries: Mapping[str, _Entry]) -> list[str]:
    return [
        f"{n}: expected float32, float16 or bfloat16, got dtype {e.dtype}"
        for n, e in sorted(entries.items())
        if e.dtype not in _DTYPES
    ]


def _is_finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # NaN comes through; unlike isfinite() this needs no memory
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _check_finite(root: Path, tensors: TensorMap) -> None:
    _raise_problems(root, [f"{n}: holds NaN or infinity" for n, t in tensors.items() if not _is_finite(t)])


# --- heads ------------------------------------------------------------------------------------------------------------

_HeadNames = list[tuple[str, dict[int, tuple[str, str]]]]
"""Per layer: the name of the normalizer, and by stored index the names of a conv's weight and bias."""


def _head_names(
    entries: Mapping[str, _Entry], pattern: re.Pattern[str], g: ModelGeometry, problems: list[str]
) -> _HeadNames:
    """Sorts the head tensors by layer and conv; what is missing or unexpected goes to `problems`."""
    normalizers: dict[int, str] = {}
    convs: dict[int, dict[str, dict[int, str]]] = {i: {"weight": {}, "bias": {}} for i in range(g.num_layers)}
    for name in sorted(entries):
        match = pattern.fullmatch(name)
        if not match or int(match[1]) >= g.num_layers:
            problems.append(f"{name}: unexpected among the fusion heads of {g.num_layers} layers")
        elif match[2]:
            normalizers[int(match[1])] = name
        else:
            convs[int(match[1])][match[4]][int(match[3])] = name
    problems += _dtype_problems(entries)
    where = "model.layers.{}.self_attn.memory_saver" if pattern is _MERGED_HEAD else "layers.{}"
    kind = "layers" if pattern is _MERGED_HEAD else "conv"
    every = sorted({j for c in convs.values() for part in c.values() for j in part} or {0})
    names: _HeadNames = []
    for i in range(g.num_layers):
        prefix = where.format(i)
        if i not in normalizers:
            problems.append(f"{prefix}.normalizer: missing, expected shape [1]")
        for part in ("weight", "bias"):
            problems += [f"{prefix}.{kind}.{j}.{part}: missing" for j in every if j not in convs[i][part]]
        names.append(
            (
                normalizers.get(i, ""),
                {j: (convs[i]["weight"].get(j, ""), convs[i]["bias"].get(j, "")) for j in every},
            )
        )
    return names


def _read_heads(
    tensors: TensorMap, names: _HeadNames, g: ModelGeometry, problems: list[str]
) -> tuple[tuple[HeadWeights, ...], int]:
    """The heads, and the step between the stored conv indices (0 with one conv). Empty if there are problems."""
    steps = sorted(names[0][1])
    stride = steps[1] - steps[0] if len(steps) > 1 else 0
    if steps != [j * stride for j in range(len(steps))] or stride > 2:
        problems.append(f"fusion heads: conv indices: expected 0, 1, 2, ... or 0, 2, 4, ..., got {steps}")
    if problems:
        return (), stride
    first = [tensors.shape(weight) for weight, _ in names[0][1].values()]
    for normalizer, convs in names:
        if tensors.shape(normalizer) != (1,):
            problems.append(f"{normalizer}: expected shape [1], got {list(tensors.shape(normalizer))}")
        channels = 2 * g.head_dim
        for (weight, bias), like in zip(convs.values(), first, strict=True):
            shape = tensors.shape(weight)
            # the first layer says how many channels come out and how wide the kernel is, all others follow it
            expected = (like[0], channels, first[0][2]) if len(like) == len(first[0]) == 3 else None
            if shape != expected or 0 in shape:
                wanted = list(expected or ("out", channels, "k"))
                problems.append(f"{weight}: expected shape {wanted}, got {list(shape)}")
            if tensors.shape(bias) != like[:1]:
                problems.append(f"{bias}: expected shape {list(like[:1])}, got {list(tensors.shape(bias))}")
            channels = like[0] if like else 0
    if problems:
        return (), stride
    mixed, hidden = first[-1][0], {s[0] for s in first[:-1]}
    if len(hidden) > 1 or any(h % mixed for h in hidden):
        problems.append(f"fusion heads: expected inner convs of one multiple of {mixed} channels, got {sorted(hidden)}")
    if problems:
        return (), stride
    heads = []
    for normalizer, convs in names:
        for name in (normalizer, *(n for pair in convs.values() for n in pair)):
            if not _is_finite(tensors[name]):
                problems.append(f"{name}: holds NaN or infinity")
            elif name.endswith(".bias") and tensors[name].abs().max().item() > MAX_ABS_BIAS:
                problems.append(
                    f"{name}: holds {tensors[name].abs().max().item():.3g}, beyond {MAX_ABS_BIAS:g}: uninitialised"
                    " memory, as when heads were added to a plain model and never trained"
                )
        pairs = tuple((tensors[weight], tensors[bias]) for weight, bias in convs.values())
        heads.append(HeadWeights(tensors[normalizer].item(), pairs))
    return tuple(heads), stride


def _head_fields(heads: tuple[HeadWeights, ...]) -> dict[str, int]:
    """What the tensors say of the configuration: the fields of `LococoConfig`, and num_mixed."""
    convs = heads[0].convs
    mixed = convs[-1][0].shape[0]
    return {
        "num_mixed": mixed,
        "kernel_size": convs[0][0].shape[2],
        "num_conv_layers": len(convs),
        "conv_expand": convs[0][0].shape[0] // mixed if len(convs) > 1 else 1,
    }


def _merged_config(flags: _Flags, heads: tuple[HeadWeights, ...], stride: int) -> LococoConfig:
    fields = _head_fields(heads)
    mixed = fields.pop("num_mixed")
    if flags.policy == "h2o":
        return _h2o_config(flags, _mem_size_for(mixed, DEFAULT_KEEP_RATE))
    activation = flags.activation or ("none" if stride == 1 else "relu")
    if stride == 1 and activation != "none":
        raise ConfigError(f"activation: got {activation}, but conv indices that step by 1 were trained with none")
    if stride == 2 and activation == "none":
        raise ConfigError("activation: got none, but conv indices that step by 2 were trained with one; name it")
    rate = DEFAULT_KEEP_RATE if flags.hh_keep_rate is None else flags.hh_keep_rate
    mem_size = _mem_size_for(mixed, rate) if flags.mem_size is None else flags.mem_size
    cache = LococoConfig.from_rate(
        mem_size,
        rate,
        block_size=mem_size if flags.block_size is None else flags.block_size,
        local_len=0 if flags.local_len is None else flags.local_len,
        buffer=DEFAULT_BUFFER if flags.buffer is None else flags.buffer,
        activation=activation,
        **fields,
    )
    if cache.num_mixed != mixed:
        raise ConfigError(
            f"mem_size={mem_size} and hh_keep_rate={rate} give int({mem_size} * (1 - {rate})) = {cache.num_mixed} mixed"
            f" slots, but the heads make {mixed}; pass the --mem-size and --hh-keep-rate of the training run"
        )
    return cache


def _mem_size_for(mixed: int, rate: float) -> int:
    """The smallest M with int(M * (1 - r)) = mc."""
    if not (isinstance(rate, int | float) and 0.0 <= rate < 1.0):
        raise ConfigError(f"hh_keep_rate: expected 0 to below 1, as the heads mix {mixed} slots, got {rate!r}")
    mem_size = max(1, int(mixed / (1 - rate)) - 1)  # one less: the division may round up
    while int(mem_size * (1 - rate)) < mixed:
        mem_size += 1
    return mem_size


def _stored_config(flags: _Flags, stored: LococoConfig) -> LococoConfig:
    if flags.policy == "h2o":
        return _h2o_config(flags, stored.mem_size, stored.block_size, stored.buffer)
    given: dict[str, Any] = {k: v for k, v in dataclasses.asdict(flags).items() if v is not None}
    rate = given.pop("hh_keep_rate", None)
    if rate is not None:
        given["keep"] = LococoConfig.from_rate(stored.mem_size, rate, stored.block_size).keep
    wrong = [f"{k}={v!r} (stored: {getattr(stored, k)!r})" for k, v in given.items() if getattr(stored, k) != v]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: contradicts {HEADS_CONFIG_NAME}, which the heads were fitted with; leave it out"
        )
    return stored


def _h2o_config(
    flags: _Flags, mem_size: int = DEFAULT_H2O_SLOTS, block_size: int | None = None, buffer: int = DEFAULT_BUFFER
) -> LococoConfig:
    """Sizes from the flags, else those given: what ignored heads were trained with, or the defaults."""
    for name in ("hh_keep_rate", "local_len", "activation"):
        if getattr(flags, name) is not None:
            raise ConfigError(f"{name}: policy h2o has none (half heavy hitters, half recent tokens); leave it out")
    mem_size = mem_size if flags.mem_size is None else flags.mem_size
    default_block = min(mem_size, DEFAULT_H2O_SLOTS if block_size is None else block_size)
    return LococoConfig.h2o(
        mem_size,
        default_block if flags.block_size is None else flags.block_size,
        buffer if flags.buffer is None else flags.buffer,
    )


def _read_heads_config(path: Path) -> LococoConfig:
    document = _read_json(path)
    if document.pop("format", None) != "lococo-heads":
        raise CorruptError(f'{path}: expected "format": "lococo-heads"')
    version = document.pop("schema_version", None)
    if version != HEADS_SCHEMA_VERSION:
        raise VersionError(f"{path}: schema_version: expected {HEADS_SCHEMA_VERSION}, got {version!r}")
    names = {f.name for f in dataclasses.fields(LococoConfig)}
    required = {f.name for f in dataclasses.fields(LococoConfig) if f.default is dataclasses.MISSING}
    if document.keys() - names or required - document.keys():
        raise CorruptError(
            f"{path}: missing {sorted(required - document.keys())}, unknown {sorted(document.keys() - names)}"
        )
    try:
        config = LococoConfig(**document)
    except (ConfigError, TypeError) as e:
        raise ConfigError(f"{path}: {e}") from e
    if config.policy != "lococo":
        raise CorruptError(f"{path}: policy: heads belong to policy lococo, got {config.policy!r}")
    return config


def _check_heads_fit(config: LococoConfig, heads: tuple[HeadWeights, ...], source: str) -> None:
    for name, value in _head_fields(heads).items():
        if getattr(config, name) != value:
            raise ConfigError(f"{source}: {name}={getattr(config, name)}, but the tensors of the heads have {value}")


def save_heads(path: str | os.PathLike[str], config: LococoConfig, heads: tuple[HeadWeights, ...]) -> None:
    """Writes `lococo_heads.safetensors` and `lococo_config.json` into the model directory `path`.

    Raises:
        ConfigError: the heads do not fit the configuration.
        StorageError, NoSpaceError: the directory cannot be written.
    """
    if config.policy != "lococo" or not heads:
        raise ConfigError(f"save_heads: expected policy lococo and heads, got {config.policy} and {len(heads)} layers")
    _check_heads_fit(config, heads, "save_heads")
    tensors = {}
    for i, head in enumerate(heads):
        tensors[f"layers.{i}.normalizer"] = torch.tensor([head.normalizer], dtype=torch.float32)
        for j, (weight, bias) in enumerate(head.convs):
            tensors[f"layers.{i}.conv.{j}.weight"] = weight.detach().cpu().contiguous()
            tensors[f"layers.{i}.conv.{j}.bias"] = bias.detach().cpu().contiguous()
    document = {"format": "lococo-heads", "schema_version": HEADS_SCHEMA_VERSION, **config.as_dict()}
    root = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".lococo.", dir=root) as staging:
            save_file(tensors, str(Path(staging) / HEADS_NAME))
            (Path(staging) / HEADS_CONFIG_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            for name in (HEADS_NAME, HEADS_CONFIG_NAME):
                os.replace(Path(staging) / name, root / name)
    except (OSError, SafetensorError) as e:
        raise storage_error(e if isinstance(e, OSError) else OSError(str(e)), root) from e
