"""Reading checkpoints: every format, what config.json may say, and every refusal with its type and text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GoldenCase
from lococo_runtime._exceptions import (
    CheckpointError,
    ConfigError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedModelError,
    VersionError,
)
from lococo_runtime.bundle import LococoConfig
from safetensors.torch import load_file, save_file
from tiny_models import (
    LLAMA3,
    VARIANTS,
    YARN,
    add_merged_heads,
    edit_config,
    edit_tensors,
    make_model,
    random_heads,
    small_cache,
)

from lococo_export.checkpoints import HeadWeights, load_checkpoint, save_heads

Q = "model.layers.0.self_attn.q_proj.weight"
SAVER = "model.layers.1.self_attn.memory_saver"


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    make_model(path)
    return path


@pytest.fixture
def plain(plain_model: Path, tmp_path: Path) -> Path:
    """A fresh copy of a tiny llama without heads."""
    return Path(shutil.copytree(plain_model, tmp_path / "model"))


MERGED = {"mem_size": 12, "hh_keep_rate": 0.5, "local_len": 3, "block_size": 8, "buffer": 4, "activation": "silu"}


@pytest.fixture
def merged(plain: Path) -> Path:
    """The tiny llama with two convolutions a layer in the merged format; MERGED are its hyper-parameters."""
    cache = small_cache(keep=6, num_conv_layers=2, conv_expand=2, activation="silu")
    add_merged_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    return plain


@pytest.fixture
def fitted(plain: Path) -> Path:
    """The tiny llama with heads in our format, of the configuration `small_cache()`."""
    cache = small_cache()
    save_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    return plain


def h2o(path: Path, **flags: Any) -> Any:
    return load_checkpoint(path, policy="h2o", **flags)


def refused(error: type[Exception], text: str, path: Path, **flags: Any) -> str:
    with pytest.raises(error, match=text) as caught:
        load_checkpoint(path, **flags)
    assert type(caught.value) is error
    return str(caught.value)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_golden_checkpoints_with_their_arguments(golden: GoldenCase) -> None:
    checkpoint = load_checkpoint(golden.path, **golden.load_args)
    args, cache = golden.args, checkpoint.config
    assert checkpoint.format == "lococo-merged"
    assert (cache.mem_size, cache.keep, cache.num_mixed) == (
        args["mem_size"],
        args["keep_hh_size"],
        args["mem_compress"],
    )
    assert (cache.kernel_size, cache.num_conv_layers, cache.conv_expand, cache.activation) == (
        args["kernel_size"],
        args["n_convlayer"],
        args["expand"] if args["n_convlayer"] > 1 else 1,
        args["hidden_act"],
    )
    assert [h.normalizer for h in checkpoint.heads] == pytest.approx(args["normalizer_per_layer"])
    assert not any("memory_saver" in name for name in checkpoint.tensors)
    assert checkpoint.geometry.eos_token_ids == [2]


def test_merged_defaults_are_the_published_ones(plain: Path) -> None:
    cache = LococoConfig(mem_size=32, keep=16, block_size=32)
    add_merged_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    assert load_checkpoint(plain).config == cache  # local_len 0, buffer 16, relu, kernel 21


def test_merged_round_trip_to_our_format(merged: Path) -> None:
    first = load_checkpoint(merged, **MERGED)
    assert first.config == small_cache(keep=6, num_conv_layers=2, conv_expand=2, activation="silu")
    names = [n for n in load_file(merged / "model.safetensors") if "memory_saver" in n]
    heads = [HeadWeights(h.normalizer, tuple((w.clone(), b.clone()) for w, b in h.convs)) for h in first.heads]
    edit_tensors(merged, dict.fromkeys(names))
    save_heads(merged, first.config, tuple(heads))
    second = load_checkpoint(merged)
    assert (second.format, second.config, second.geometry) == ("lococo-heads", first.config, first.geometry)
    assert list(second.tensors) == list(first.tensors)
    for mine, theirs in zip(second.heads, heads, strict=True):
        assert mine.normalizer == theirs.normalizer
        for (weight, bias), (other_weight, other_bias) in zip(mine.convs, theirs.convs, strict=True):
            assert torch.equal(weight, other_weight)
            assert torch.equal(bias, other_bias)
    assert load_checkpoint(merged, policy="lococo", mem_size=12, hh_keep_rate=0.5, activation="silu").heads


def test_heads_file_is_as_documented(fitted: Path) -> None:
    tensors = load_file(fitted / "lococo_heads.safetensors")
    assert {n: list(t.shape) for n, t in tensors.items() if n.startswith("layers.1.")} == {
        "layers.1.normalizer": [1],
        "layers.1.conv.0.weight": [5, 16, 5],
        "layers.1.conv.0.bias": [5],
    }
    document = json.loads((fitted / "lococo_config.json").read_text())
    assert (document.pop("format"), document.pop("schema_version")) == ("lococo-heads", 1)
    assert document == small_cache().as_dict()
    assert not [p for p in fitted.iterdir() if p.name.startswith(".")]


def test_plain_model_with_h2o(plain: Path) -> None:
    checkpoint = h2o(plain)
    assert (checkpoint.format, checkpoint.heads, checkpoint.heads_ignored) == ("plain", (), False)
    assert checkpoint.config == LococoConfig.h2o(512, 512)
    assert h2o(plain, mem_size=100, buffer=3).config == LococoConfig.h2o(100, 100, 3)
    assert h2o(plain, mem_size=700, block_size=64).config == LococoConfig.h2o(700, 64)


def test_h2o_ignores_heads_and_records_it(merged: Path) -> None:
    checkpoint = h2o(merged)
    assert (checkpoint.format, checkpoint.heads, checkpoint.heads_ignored) == ("lococo-merged", (), True)
    assert checkpoint.config == LococoConfig.h2o(12, 12)
    assert not any("memory_saver" in name for name in checkpoint.tensors)


def test_h2o_takes_the_sizes_of_fitted_heads(fitted: Path) -> None:
    checkpoint = h2o(fitted)
    assert (checkpoint.format, checkpoint.heads_ignored) == ("lococo-heads", True)
    assert checkpoint.config == LococoConfig.h2o(12, 8, 4)
    assert h2o(fitted, mem_size=20, block_size=5).config == LococoConfig.h2o(20, 5, 4)


def test_tensors_are_read_one_at_a_time(plain: Path) -> None:
    tensors = h2o(plain).tensors
    stored = load_file(plain / "model.safetensors")
    assert list(tensors) == sorted(stored)
    assert tensors.shape(Q) == (32, 32)
    assert tensors.dtype(Q) == torch.float32
    assert tensors.nbytes == sum(t.nbytes for t in stored.values())
    assert torch.equal(tensors[Q], stored[Q])
    assert tensors[Q] is not tensors[Q]


def shard(path: Path, suffix: str, save: Callable[[dict[str, torch.Tensor], Path], None]) -> Path:
    """Splits the weights of `path` in two files with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for k in range(2):
        part = dict(list(tensors.items())[k::2])
        save(part, path / f"{stem}-{k}.{suffix}")
        weight_map.update(dict.fromkeys(part, f"{stem}-{k}.{suffix}"))
    index = path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_weights(plain: Path) -> None:
    whole = {n: t.clone() for n, t in h2o(plain).tensors.items()}
    index = shard(plain, "safetensors", save_file)
    tensors = h2o(plain).tensors
    assert list(tensors) == list(whole)
    assert all(torch.equal(t, whole[n]) for n, t in tensors.items())

    edit_tensors(plain, {"extra": torch.ones(1)}, "model-0.safetensors")
    refused(CheckpointError, r"extra: in model-0.safetensors, but not in model.safetensors.index.json", plain)
    edit_tensors(plain, {"extra": None, Q: None}, "model-0.safetensors")
    edit_tensors(plain, {Q: None}, "model-1.safetensors")
    refused(CheckpointError, f"{Q}: missing from model-", plain)
    (plain / "model-1.safetensors").unlink()
    refused(NotFoundError, r"model-1\.safetensors: not found", plain)
    index.write_text(json.dumps({"weight_map": {Q: "../model-0.safetensors"}}))
    refused(CorruptError, "names of files beside it", plain)
    index.write_text(json.dumps({"weight_map": []}))
    refused(CorruptError, "weight_map: expected an object", plain)
    index.write_text("{")
    refused(CorruptError, r"index\.json: not valid JSON", plain)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_need_permission(plain: Path, sharded: bool) -> None:
    whole = {n: t.clone() for n, t in h2o(plain).tensors.items()}
    if sharded:
        shard(plain, "bin", torch.save)
    else:
        torch.save(whole, plain / "pytorch_model.bin")
        (plain / "model.safetensors").unlink()
    refused(InvalidArgumentError, r"pytorch_model\.bin.*can run code.*pass --allow-pickle", plain, policy="h2o")
    tensors = h2o(plain, allow_pickle=True).tensors
    assert list(tensors) == list(whole)
    assert all(torch.equal(t, whole[n]) for n, t in tensors.items())


def test_pickles_that_are_no_weights(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    torch.save({"a": print}, plain / "pytorch_model.bin")
    refused(CorruptError, r"pytorch_model\.bin: not weights that torch\.load", plain, allow_pickle=True)
    torch.save({"a": 1}, plain / "pytorch_model.bin")
    refused(CorruptError, "expected a state dict of tensors", plain, allow_pickle=True)
    (plain / "pytorch_model.bin").write_bytes(b"no")
    refused(CorruptError, r"pytorch_model\.bin: not weights", plain, allow_pickle=True)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_geometry_of_every_family(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    make_model(tmp_path, family, **changes)
    g = h2o(tmp_path, mem_size=64).geometry
    assert (g.family, g.vocab_size, g.hidden_size, g.intermediate_size) == (family, 96, 32, 48)
    assert (g.num_layers, g.num_heads, g.num_kv_heads) == (2, 4, changes.get("num_key_value_heads", 2))
    assert g.head_dim == changes.get("head_dim", 8)
    assert g.tie_word_embeddings is changes.get("tie_word_embeddings", False)
    assert g.qkv_bias is (family == "qwen2" or changes.get("attention_bias", False))
    assert g.output_bias is changes.get("attention_bias", False)
    assert g.mlp_bias is changes.get("mlp_bias", False)
    assert g.qk_norm is (family == "qwen3")
    rope = changes.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    assert g.rope["type"] == rope["rope_type"]
    assert g.rope["theta"] == rope["rope_theta"]
    assert {k: v for k, v in g.rope.items() if k not in ("type", "theta")} == {
        k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")
    }
    assert ("lm_head.weight" in h2o(tmp_path, mem_size=64).tensors) is not g.tie_word_embeddings


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {"type": "default", "theta": 5000.0}),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "theta": 5000.0, "factor": 4.0}),
        (
            {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            {"type": "llama3", "theta": 5000.0} | {k: v for k, v in LLAMA3.items() if not k.startswith("rope")},
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 64},  # the factor follows from max_position_embeddings
            {"type": "yarn", "theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {"type": "yarn", "factor": 2.0},
            {"type": "yarn", "theta": 5000.0, "factor": 2.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_rope_as_written_before_transformers_5(
    plain: Path, scaling: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    edit_config(plain, rope_parameters=..., rope_scaling=scaling, rope_theta=5000.0)
    assert h2o(plain).geometry.rope == expected


def test_head_dim_defaults_to_a_share_of_the_hidden_size(plain: Path) -> None:
    edit_config(plain, head_dim=..., num_key_value_heads=2)
    assert h2o(plain).geometry.head_dim == 8
    edit_config(plain, head_dim=None)
    assert h2o(plain).geometry.head_dim == 8


def test_end_tokens_of_the_generation_config_come_first(plain: Path) -> None:
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "bos_token_id": None}))
    g = h2o(plain).geometry
    assert (g.eos_token_ids, g.bos_token_id) == ([5, 6], 1)
    (plain / "generation_config.json").unlink()
    edit_config(plain, eos_token_id=7)
    assert h2o(plain).geometry.eos_token_ids == [7]
    edit_config(plain, eos_token_id="</s>")
    refused(CorruptError, "eos_token_id: expected an integer or a list", plain)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model_type": "mamba"}, UnsupportedModelError, "'mamba' is not supported; .* llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, UnsupportedModelError, "model_type None is not supported"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantization_config: expected plain"),
        ({"num_local_experts": 8}, UnsupportedModelError, "mixtures of experts"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act: expected 'silu', got 'gelu'"),
        ({"hidden_size": ...}, CorruptError, r"config\.json: hidden_size: expected an integer, got None"),
        ({"vocab_size": "96"}, CorruptError, "vocab_size: expected an integer, got '96'"),
        ({"rms_norm_eps": "x"}, CorruptError, "rms_norm_eps: expected a small number"),
        ({"rms_norm_eps": float("nan")}, CorruptError, "rms_norm_eps: expected a small number, got nan"),
        ({"head_dim": ..., "num_attention_heads": 5}, CorruptError, "head_dim is not given"),
        ({"num_key_value_heads": 3}, ConfigError, r"config\.json: num_heads: expected a multiple of num_kv_heads=3"),
        ({"rope_parameters": 7}, CorruptError, "rope_parameters: expected an object"),
        ({"rope_parameters": {"full_attention": {}}}, UnsupportedModelError, "differ between layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "whole text"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
    ],
)
def test_config_refusals(plain: Path, changes: dict[str, Any], error: type[Exception], text: str) -> None:
    edit_config(plain, **changes)
    refused(error, text, plain, policy="h2o")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_sliding_windows(family: str, tmp_path: Path) -> None:
    used = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    make_model(tmp_path, family, sliding_window=150, **used)
    sizes = {"mem_size": 64, "block_size": 32, "buffer": 16}  # 112 columns
    assert h2o(tmp_path, **sizes)
    text = refused(
        UnsupportedModelError, "sliding_window=150: .* up to 192 columns", tmp_path, policy="h2o", mem_size=88
    )
    assert "lower --mem-size or --block-size" in text
    edit_config(tmp_path, sliding_window=None)
    assert h2o(tmp_path, mem_size=400)
    if family != "mistral":
        edit_config(tmp_path, sliding_window=150, use_sliding_window=False)
        assert h2o(tmp_path, mem_size=400)
        edit_config(tmp_path, use_sliding_window=True, layer_types=["full_attention"] * 2)
        assert h2o(tmp_path, mem_size=400)
        edit_config(tmp_path, layer_types=..., max_window_layers=2)
        assert h2o(tmp_path, mem_size=400)
    else:
        edit_config(tmp_path, sliding_window=...)  # absent: 4096
        refused(UnsupportedModelError, "sliding_window=4096", tmp_path, policy="h2o", mem_size=4000)


def test_malformed_files(plain: Path) -> None:
    refused(NotFoundError, "expected a model directory", plain / "nowhere")
    (plain / "generation_config.json").write_text("[]")
    refused(CorruptError, r"generation_config\.json: expected a JSON object, got list", plain)
    (plain / "config.json").write_bytes(b"\xff")
    refused(CorruptError, r"config\.json: not valid JSON", plain)
    (plain / "config.json").unlink()
    refused(NotFoundError, r"config\.json: not found", plain)
    (plain / "config.json").mkdir()
    refused(StorageError, r"config\.json: Is a directory", plain)


def test_truncated_weights(plain: Path) -> None:
    weights = plain / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(CorruptError, r"model\.safetensors: not a whole safetensors file", plain, policy="h2o")
    weights.unlink()
    refused(NotFoundError, r"expected model\.safetensors or", plain, policy="h2o")
    save_file({"a": torch.ones(1)}, plain / "adapter_model.safetensors")
    refused(CheckpointError, "only a LoRA adapter; merge it", plain, policy="h2o")


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_every_problem_is_named_at_once(plain: Path) -> None:
    edit_tensors(
        plain,
        {
            Q: None,
            "model.norm.weight": torch.ones(31),
            "model.layers.1.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8),
            "model.layers.0.self_attn.q_proj.bias": torch.ones(32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),  # harmless
        },
    )
    text = refused(CheckpointError, r"4 problem\(s\) with its tensors", plain, policy="h2o")
    assert f"{Q}: missing, expected shape [32, 32]" in text
    assert "model.norm.weight: expected shape [32], got [31]" in text
    assert "model.layers.1.mlp.up_proj.weight: expected float32, float16 or bfloat16, got dtype I8" in text
    assert "model.layers.0.self_attn.q_proj.bias: unexpected in a llama model" in text


def test_long_lists_are_capped(plain: Path) -> None:
    edit_tensors(plain, {f"extra.{i:02}": torch.ones(1) for i in range(25)})
    text = refused(CheckpointError, r"25 problem\(s\)", plain, policy="h2o")
    assert "extra.19" in text
    assert "extra.20" not in text
    assert text.endswith("and 5 more")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_weights(plain: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(32, 32, dtype=dtype)
    bad[3, 5] = value
    edit_tensors(plain, {Q: bad})
    refused(CheckpointError, rf"1 problem.*\n  {re.escape(Q)}: holds NaN or infinity", plain, policy="h2o")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_weights(plain: Path, dtype: torch.dtype) -> None:
    edit_tensors(plain, {n: t.to(dtype) for n, t in load_file(plain / "model.safetensors").items()})
    assert h2o(plain).dtype == str(dtype).removeprefix("torch.")


def test_tied_embeddings(tmp_path: Path) -> None:
    make_model(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, {"lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in h2o(tmp_path).tensors
    for other in (embedding + 1, embedding.half(), embedding[:5].clone()):
        edit_tensors(tmp_path, {"lm_head.weight": other})
        refused(CheckpointError, "lm_head.weight: differs from the embedding", tmp_path, policy="h2o")
    edit_tensors(tmp_path, {"lm_head.weight": None})
    edit_config(tmp_path, tie_word_embeddings=False)
    refused(CheckpointError, r"lm_head.weight: missing, expected shape \[96, 32\]", tmp_path, policy="h2o")


@pytest.mark.parametrize(
    "name", ["base_model.model.model.norm.weight", "model.layers.0.self_attn.q_proj.lora_A.default.weight"]
)
def test_unmerged_lora_states(plain: Path, name: str) -> None:
    edit_tensors(plain, {name: torch.ones(2, 2)})
    refused(CheckpointError, rf"1 tensor\(s\) of an unmerged LoRA.*{re.escape(name)}.*merge the adapters", plain)


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_plain_model_needs_a_choice(plain: Path) -> None:
    for policy in (None, "lococo"):
        refused(ConfigError, "without fusion heads.*Fit heads for it first, or pass --policy h2o", plain, policy=policy)
    refused(ConfigError, "policy: expected lococo or h2o, got 'window'", plain, policy="window")
    for flag in ({"hh_keep_rate": 0.5}, {"local_len": 4}, {"activation": "relu"}):
        refused(ConfigError, "policy h2o has none", plain, policy="h2o", **flag)
    refused(ConfigError, "mem_size: expected at least 1", plain, policy="h2o", mem_size=0)
    refused(ConfigError, "block_size: expected at least 1", plain, policy="h2o", block_size=0)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"mem_size": 16}, r"mem_size=16 and hh_keep_rate=0.5 give int\(16 \* \(1 - 0.5\)\) = 8 .* the heads make 6"),
        ({"hh_keep_rate": 0.9}, "no mixed slot is left|give int"),
        ({"mem_size": None, "hh_keep_rate": 1.0}, "hh_keep_rate: expected 0 to below 1"),
        ({"local_len": 7}, "local_len: expected 0 to keep=6"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"mem_size": 0}, "mem_size: expected at least 1"),
        ({"activation": "none"}, "step by 2 were trained with one"),
        ({"activation": "softplus"}, "activation: expected one of none, relu"),
        ({"buffer": -1}, "buffer: expected at least 0"),
    ],
)
def test_merged_hyper_parameters_that_do_not_fit(merged: Path, flags: dict[str, Any], text: str) -> None:
    refused(ConfigError, text, merged, **MERGED | flags)


@pytest.mark.parametrize(("rate", "mem_size"), [(0.5, 12), (0.25, 8), (0.9, 61), (0.0, 6)])
def test_mem_size_follows_from_the_keep_rate(merged: Path, rate: float, mem_size: int) -> None:
    # int(60 * (1 - 0.9)) is 5: the float product falls short of 6
    cache = load_checkpoint(merged, **MERGED | {"mem_size": None, "hh_keep_rate": rate, "local_len": 0}).config
    assert (cache.mem_size, cache.num_mixed) == (mem_size, 6)


def test_convolutions_without_activation(plain: Path) -> None:
    cache = small_cache(num_conv_layers=3, conv_expand=2, activation="none", local_len=0)
    add_merged_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    sizes = {"mem_size": 12, "hh_keep_rate": 0.55, "block_size": 8, "buffer": 4}
    assert load_checkpoint(plain, **sizes).config == cache
    refused(ConfigError, "step by 1 were trained with none", plain, **sizes, activation="relu")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{SAVER}.normalizer": None}, f"{SAVER}.normalizer: missing"),
        ({f"{SAVER}.normalizer": torch.ones(2)}, f"{SAVER}.normalizer: expected shape [1], got [2]"),
        ({f"{SAVER}.normalizer": torch.tensor([torch.nan])}, f"{SAVER}.normalizer: holds NaN or infinity"),
        ({f"{SAVER}.layers.0.bias": None}, f"{SAVER}.layers.0.bias: missing"),
        ({f"{SAVER}.layers.2.bias": torch.ones(5)}, f"{SAVER}.layers.2.bias: expected shape [6], got [5]"),
        ({f"{SAVER}.layers.2.bias": torch.full((6,), torch.inf)}, f"{SAVER}.layers.2.bias: holds NaN or infinity"),
        ({f"{SAVER}.layers.2.bias": torch.full((6,), -2e4)}, "holds 2e+04, beyond 1000: uninitialised memory"),
        ({f"{SAVER}.layers.0.weight": torch.ones(12, 15, 5)}, "expected shape [12, 16, 5], got [12, 15, 5]"),
        ({f"{SAVER}.layers.0.weight": torch.ones(12, 16)}, "expected shape [12, 16, 5], got [12, 16]"),
        ({f"{SAVER}.layers.2.weight": torch.ones(6, 12, 3)}, "expected shape [6, 12, 5], got [6, 12, 3]"),
        ({f"{SAVER}.layers.4.weight": torch.ones(6, 6, 5)}, f"{SAVER}.layers.4.bias: missing"),
        ({f"{SAVER}.layers.2.gain": torch.ones(6)}, f"{SAVER}.layers.2.gain: unexpected among the fusion heads"),
        ({SAVER.replace("1", "2") + ".normalizer": torch.ones(1)}, "unexpected among the fusion heads of 2 layers"),
        ({f"{SAVER}.layers.0.weight": torch.ones(12, 16, 5).int()}, "got dtype I32"),
        ({f"{SAVER.replace('1', '0')}.layers.2.weight": torch.tensor(1.0)}, "got []"),
        ({f"{SAVER.replace('1', '0')}.layers.2.weight": torch.ones(0, 12, 5)}, "got [0, 12, 5]"),
        ({f"{SAVER.replace('1', '0')}.layers.0.weight": torch.ones(9, 16, 5)}, "got [12, 16, 5]"),
        ({f"{SAVER.replace('1', '0')}.layers.0.weight": torch.ones(12, 16)}, "got [12, 16]"),
    ],
)
def test_damaged_heads(merged: Path, changes: dict[str, torch.Tensor | None], text: str) -> None:
    edit_tensors(merged, changes)
    refused(CheckpointError, re.escape(text), merged, **MERGED)


def test_inner_convolutions_of_different_width(plain: Path) -> None:
    cache = small_cache(num_conv_layers=3, conv_expand=2)
    add_merged_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    changes: dict[str, torch.Tensor | None] = {}
    for i in (0, 1):
        saver = f"model.layers.{i}.self_attn.memory_saver.layers"
        changes |= {f"{saver}.0.weight": torch.ones(15, 16, 5), f"{saver}.0.bias": torch.ones(15)}
        changes |= {f"{saver}.2.weight": torch.ones(10, 15, 5)}
    edit_tensors(plain, changes)
    refused(CheckpointError, r"expected inner convs of one multiple of 5 channels, got \[10, 15\]", plain)


def test_even_kernels(plain: Path) -> None:
    cache = LococoConfig(mem_size=8, keep=4, block_size=8, kernel_size=3)
    add_merged_heads(plain, cache, random_heads(h2o(plain).geometry, cache))
    edit_tensors(
        plain, {f"model.layers.{i}.self_attn.memory_saver.layers.0.weight": torch.ones(4, 16, 4) for i in (0, 1)}
    )
    refused(ConfigError, "kernel_size: expected an odd number", plain)


@pytest.mark.parametrize(
    "flags",
    [
        {"mem_size": 16},
        {"local_len": 0},
        {"block_size": 12},
        {"activation": "silu"},
        {"buffer": 16},
        {"hh_keep_rate": 0.9},
    ],
)
def test_flags_that_contradict_the_stored_configuration(fitted: Path, flags: dict[str, Any]) -> None:
    name = "keep" if "hh_keep_rate" in flags else next(iter(flags))
    refused(ConfigError, rf"{name}=.*stored.*contradicts lococo_config\.json", fitted, **flags)


def test_damaged_heads_configuration(fitted: Path) -> None:
    path = fitted / "lococo_config.json"
    document = json.loads(path.read_text())

    def refused_with(error: type[Exception], text: str, **changes: Any) -> None:
        path.write_text(json.dumps({k: v for k, v in (document | changes).items() if v is not ...}))
        refused(error, text, fitted)

    refused_with(CorruptError, "lococo_config.json: expected .format", format=...)
    refused_with(VersionError, "schema_version: expected 1, got 2", schema_version=2)
    refused_with(CorruptError, r"missing \['mem_size'\], unknown \['slots'\]", mem_size=..., slots=3)
    refused_with(ConfigError, r"lococo_config\.json: local_len: expected 0 to keep", local_len=9)
    refused_with(ConfigError, r"lococo_config\.json: '<", score_decay="x")
    refused_with(CorruptError, "heads belong to policy lococo", policy="h2o", keep=12)
    refused_with(ConfigError, "num_mixed=4, but the tensors of the heads have 5", keep=8)
    refused_with(ConfigError, "kernel_size=7, but the tensors of the heads have 5", kernel_size=7)
    path.unlink()
    refused(NotFoundError, r"lococo_config\.json: not found", fitted)


def test_damaged_heads_file(fitted: Path) -> None:
    path = fitted / "lococo_heads.safetensors"
    edit_tensors(fitted, {"layers.0.conv.0.bias": torch.full((5,), 1e30)}, path.name)
    refused(CheckpointError, r"layers\.0\.conv\.0\.bias: holds 1e\+30, beyond 1000", fitted)
    path.write_bytes(path.read_bytes()[:-1])
    refused(CorruptError, r"lococo_heads\.safetensors: not a whole safetensors file", fitted)
    path.unlink()
    refused(NotFoundError, r"lococo_heads\.safetensors: not found", fitted)


def test_heads_twice(merged: Path) -> None:
    cache = small_cache()
    save_heads(merged, cache, random_heads(load_checkpoint(merged, **MERGED).geometry, cache))
    refused(CheckpointError, "heads twice", merged)


def test_saving_heads_that_do_not_fit(plain: Path) -> None:
    geometry = h2o(plain).geometry
    heads = random_heads(geometry, small_cache())
    with pytest.raises(ConfigError, match="save_heads: kernel_size=7, but"):
        save_heads(plain, small_cache(kernel_size=7), heads)
    with pytest.raises(ConfigError, match="expected policy lococo and heads"):
        save_heads(plain, LococoConfig.h2o(8, 8), heads)
    with pytest.raises(StorageError, match="nowhere"):
        save_heads(plain / "nowhere", small_cache(), heads)
    assert not (plain / "lococo_heads.safetensors").exists()


def test_yarn_needs_a_known_context(plain: Path) -> None:
    edit_config(plain, rope_parameters={k: v for k, v in YARN.items() if k != "factor"}, max_position_embeddings=...)
    refused(ConfigError, "factor: expected a number above 0, got None", plain)
