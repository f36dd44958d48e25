"""Tiny random models of every family, saved as Hugging Face directories."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from lococo_runtime.bundle import LococoConfig, ModelGeometry
from safetensors.torch import load_file, save_file

from lococo_export.checkpoints import HeadWeights

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_FULL = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases-mqa": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-llama3-wide-heads": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-full": ("llama", {"rope_parameters": YARN_FULL, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 200}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}
"""One model for every option that changes the arithmetic."""


def make_model(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """Saves a random float32 model to `path` and returns it, a transformers model in eval mode.

    All weights are random, norms and biases too, and large enough for logits of order 1.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

    config = AutoConfig.for_model(family, **{**BASE, "rope_parameters": dict(DEFAULT), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.1 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise * (1.0 if "embed" in name else weight.shape[1] ** -0.5))
    model.save_pretrained(path)
    return model


def random_heads(geometry: ModelGeometry, cache: LococoConfig, seed: int = 0) -> tuple[HeadWeights, ...]:
    """Random fusion heads of the right shapes, float32, a different normalizer in every layer."""
    generator = torch.Generator().manual_seed(seed)
    channels = [2 * geometry.head_dim]
    channels += [cache.num_mixed * cache.conv_expand] * (cache.num_conv_layers - 1) + [cache.num_mixed]

    def conv(n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(n_out, n_in, cache.kernel_size, generator=generator)
        return weight * 2 * (n_in * cache.kernel_size) ** -0.5, 0.1 * torch.randn(n_out, generator=generator)

    return tuple(
        HeadWeights(0.4 + 0.1 * i, tuple(conv(*pair) for pair in itertools.pairwise(channels)))
        for i in range(geometry.num_layers)
    )


def add_merged_heads(path: Path, cache: LococoConfig, heads: tuple[HeadWeights, ...]) -> None:
    """Adds heads to the single safetensors file of the model at `path`, as the merged format has them."""
    step = 1 if cache.activation == "none" else 2
    tensors = load_file(path / "model.safetensors")
    for i, head in enumerate(heads):
        prefix = f"model.layers.{i}.self_attn.memory_saver"
        tensors[f"{prefix}.normalizer"] = torch.tensor([head.normalizer])
        for j, (weight, bias) in enumerate(head.convs):
            tensors[f"{prefix}.layers.{j * step}.weight"] = weight
            tensors[f"{prefix}.layers.{j * step}.bias"] = bias
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Sets fields of `config.json`; a field set to `...` is removed."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}, indent=2))


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None], name: str = "model.safetensors") -> None:
    """Sets tensors of a safetensors file; None removes one."""
    tensors: dict[str, Any] = load_file(path / name) | changes
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path / name, {"format": "pt"})


def small_cache(**changes: Any) -> LococoConfig:
    """A LoCoCo cache small enough to fuse often: M=12, 7 kept, 3 of them recent, blocks of 8, 4 slots of buffer."""
    base = LococoConfig(mem_size=12, keep=7, block_size=8, local_len=3, buffer=4, kernel_size=5)
    return dataclasses.replace(base, **changes)
