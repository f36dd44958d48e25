"""Bundles for the GPU tests and the GPU benchmark, exported where torch is.

Usage: gpu_bundles.py tests OUT, or gpu_bundles.py bench OUT [MODEL or SHAPE[:LAYERS]]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from bundles import EXPORTS, add_random_heads
from lococo_runtime.bundle import LococoConfig
from tiny_models import BASE, DEFAULT
from transformers import AutoConfig, AutoModelForCausalLM

from lococo_export import export_bundle, load_checkpoint

# No end of sequence, so that random tokens never end a measurement.
SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    },
    "llama-2-7b": {  # 13 GB of weights, twice on the disk and in memory
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "eos_token_id": None,
    },
}


def make_large_model(path: Path, changes: dict[str, Any]) -> None:
    """A float16 model, in the time that writing it takes: its matrices repeat the same million random numbers."""
    config = AutoConfig.for_model("llama", **{**BASE, "rope_parameters": dict(DEFAULT), **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.to_empty(device="cpu")
    model.tie_weights()
    noise = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1)
                continue
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            weight.copy_((noise * scale).repeat(-(-weight.numel() // len(noise)))[: weight.numel()].view(weight.shape))
    model.save_pretrained(path)


def export_benchmark(target: Path, model: str) -> None:
    """M = B = 512 in float16, of a checkpoint directory, or of random weights in a shape, kept beside `target`."""
    shape, _, layers = model.partition(":")
    checkpoint = Path(model)
    if shape in SHAPES:
        checkpoint = target.with_name(f"{target.name}-checkpoint")
        shutil.rmtree(checkpoint, ignore_errors=True)  # of another shape
        changes = SHAPES[shape] | ({"num_hidden_layers": int(layers)} if layers else {})
        make_large_model(checkpoint, changes)
        add_random_heads(checkpoint, LococoConfig(512, 256, 512))
    export_bundle(load_checkpoint(checkpoint), target, dtype="float16", batch=8, force=True)


if __name__ == "__main__":
    kind, out = sys.argv[1], Path(sys.argv[2])
    if kind == "tests":
        out.mkdir(parents=True, exist_ok=True)
        for name, export in EXPORTS.items():
            shutil.rmtree(out / name, ignore_errors=True)  # its engines too
            export(out / name)
    else:
        export_benchmark(out, sys.argv[3] if len(sys.argv) > 3 else "smollm2-135m")
