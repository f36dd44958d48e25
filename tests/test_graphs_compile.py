"""Every graph of a bundle parses and compiles with TensorRT for RTX, ahead of time, without a GPU.

It logs that there is no CUDA driver; that is expected. Compiling proves shapes, dtypes and operators, not results.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from conftest import GOLDEN_NAMES, unpack_golden
from lococo_engines import build_engines, choose, read_engines
from lococo_runtime.bundle import LococoConfig, read_manifest
from tiny_models import random_heads

from lococo_export import export_bundle, load_checkpoint

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is missing: pip install 'lococo-export[rtx]'")
pytest.importorskip("polygraphy", reason="polygraphy is missing: pip install 'lococo-export[rtx]'")

TARGET = "rtx:sm86,sm89,sm120"
SMOLLM2 = Path(
    os.environ.get(
        "LOCOCO_SMOLLM2", Path(__file__).resolve().parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"
    )
)


def compile_all(bundle: Path, weights: str = "shared") -> None:
    recipe, target = choose("auto", TARGET)
    engines = read_engines(build_engines(bundle, recipe.replace(weights=weights), target))
    graphs = read_manifest(bundle).graphs
    assert engines.sm == (86, 89, 120)
    assert [p.name for p in engines.plans] == [g.name for g in graphs]
    assert [(p.inputs, p.outputs) for p in engines.plans] == [(g.inputs, g.outputs) for g in graphs]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_bundles(name: str, dtype: str, tmp_path: Path) -> None:
    golden = unpack_golden(name, tmp_path / "checkpoint")
    export_bundle(load_checkpoint(golden.path, **golden.load_args), tmp_path / "bundle", dtype=dtype)
    compile_all(tmp_path / "bundle")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_h2o(dtype: str, tmp_path: Path) -> None:
    """Policy h2o: accumulated scores, no convolutions."""
    golden = unpack_golden("c1_baseline", tmp_path / "checkpoint")
    checkpoint = load_checkpoint(golden.path, policy="h2o", mem_size=32, block_size=32, buffer=16)
    export_bundle(checkpoint, tmp_path / "bundle", dtype=dtype)
    compile_all(tmp_path / "bundle")


def test_embedded_weights(tmp_path: Path) -> None:
    golden = unpack_golden("c5_rope4", tmp_path / "checkpoint")
    export_bundle(load_checkpoint(golden.path, **golden.load_args), tmp_path / "bundle", dtype="float16")
    compile_all(tmp_path / "bundle", "embedded")


@pytest.mark.smollm2
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing: run scripts/fetch_smollm2.py")
def test_smollm2(tmp_path: Path) -> None:
    """fp16, 512 slots, random fusion heads; the model's weights, 269 MB, are in none of the plans."""
    plain = load_checkpoint(SMOLLM2, policy="h2o", mem_size=512, block_size=512)
    cache = LococoConfig.from_rate(512, 0.5, 512, local_len=64)
    checkpoint = dataclasses.replace(plain, config=cache, heads=random_heads(plain.geometry, cache))
    export_bundle(checkpoint, tmp_path / "bundle", dtype="float16")
    compile_all(tmp_path / "bundle")
    engines = read_engines(next((tmp_path / "bundle" / "engines").glob("rtx-*")))
    weights_bytes = sum(w.nbytes for w in engines.plans[0].weights)
    assert weights_bytes > 250e6
    assert all(p.nbytes < 20e6 + p.constant_bytes for p in engines.plans)  # fusion heads are constants
    assert all(p.constant_bytes < 2e6 for p in engines.plans if p.kind != "fusion")
