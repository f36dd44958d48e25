"""Bundles for the GPU tests and the GPU benchmark, exported where torch is.

Usage: gpu_bundles.py tests OUT, or gpu_bundles.py bench OUT [MODEL]
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import GOLDEN_NAMES, unpack_golden
from lococo_runtime.bundle import LococoConfig
from tiny_models import make_model, random_heads

from lococo_export import export_bundle, load_checkpoint
from lococo_export.checkpoints import save_heads

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
# scores accumulate, and there are three widths
ACCUMULATED = LococoConfig(mem_size=24, keep=12, block_size=40, local_len=2, kernel_size=5, buffer=7, score_decay=1.0)
WIDE = {"vocab_size": 60000, "hidden_size": 512, "num_hidden_layers": 1, "eos_token_id": None}  # 240 MB of weights


def make_random(model: Path, cache: LococoConfig, **changes: Any) -> None:
    """A checkpoint of random weights and random heads."""
    model.mkdir(parents=True, exist_ok=True)
    make_model(model, **changes)
    geometry = load_checkpoint(model, policy="h2o", mem_size=cache.mem_size).geometry
    heads = random_heads(geometry, cache)  # a normalizer above 1 would overflow float16 after many fusions
    save_heads(model, cache, tuple(dataclasses.replace(h, normalizer=min(h.normalizer, 0.9)) for h in heads))


def export_random(target: Path, cache: LococoConfig, dtype: str, **changes: Any) -> None:
    """A bundle of a random model with random heads."""
    with tempfile.TemporaryDirectory() as scratch:
        make_random(Path(scratch), cache, **changes)
        export_bundle(load_checkpoint(scratch), target, dtype=dtype, force=True)


def export_tests(root: Path) -> None:
    """The golden cases in float32; accumulated scores in float32 and float16, and by age; a model that fills memory.

    `own_kernels` is the first golden case, for engines of TensorRT's own kernels.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in GOLDEN_NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            case = unpack_golden(name, Path(scratch))
            export_bundle(load_checkpoint(case.path, **case.load_args), root / name, force=True)
    shutil.copytree(root / GOLDEN_NAMES[0], root / "own_kernels", dirs_exist_ok=True)
    export_random(root / "accumulated", ACCUMULATED, "float32")
    export_random(root / "accumulated_fp16", ACCUMULATED, "float16")
    aging = dataclasses.replace(ACCUMULATED, score_decay=0.9, decay_per="token")
    export_random(root / "aging", aging, "float32")
    export_random(root / "wide", LococoConfig(32, 16, 32), "float32", **WIDE)


def export_benchmark(target: Path, model: Path | None) -> None:
    """M = B = 512 in float16, of `model`; without one, of a checkpoint of random weights beside `target`."""
    if model is None:
        model = target.with_name(f"{target.name}-checkpoint")
        make_random(model, LococoConfig(512, 256, 512), **SMOLLM2)
    export_bundle(load_checkpoint(model), target, dtype="float16", force=True)


if __name__ == "__main__":
    kind, out = sys.argv[1], Path(sys.argv[2])
    if kind == "tests":
        export_tests(out)
    else:
        export_benchmark(out, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
