"""Bundles for the GPU tests and the GPU benchmark, exported where torch is.

Usage: gpu_bundles.py tests OUT, or gpu_bundles.py bench OUT [MODEL]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bundles import EXPORTS, make_checkpoint
from lococo_runtime.bundle import LococoConfig

from lococo_export import export_bundle, load_checkpoint

SMOLLM2 = {  # the shape of SmolLM2-135M; no end of sequence, so that random tokens never end a measurement
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "eos_token_id": None,
}


def export_benchmark(target: Path, model: Path | None) -> None:
    """M = B = 512 in float16, of `model`; without one, of a checkpoint of random weights beside `target`."""
    if model is None:
        model = target.with_name(f"{target.name}-checkpoint")
        make_checkpoint(model, LococoConfig(512, 256, 512), **SMOLLM2)
    export_bundle(load_checkpoint(model), target, dtype="float16", batch=8, force=True)


if __name__ == "__main__":
    kind, out = sys.argv[1], Path(sys.argv[2])
    if kind == "tests":
        out.mkdir(parents=True, exist_ok=True)
        for name, export in EXPORTS.items():
            shutil.rmtree(out / name, ignore_errors=True)  # its engines too
            export(out / name)
    else:
        export_benchmark(out, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
