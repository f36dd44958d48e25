"""Checkpoint to bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from lococo_runtime.bundle import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Manifest,
    check_batch,
    check_model_dtype,
    file_entry,
    graph_specs,
    producer,
    publish_directory,
)

from .checkpoints import Checkpoint
from .graphs import GraphWriter, write_weights
from .onnx_writer import WeightsFile

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
COPIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def export_bundle(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    batch: int = 1,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Writes the bundle of `checkpoint` to the directory `target`, whole or not at all.

    Args:
        checkpoint: from `load_checkpoint`.
        target: the bundle directory to make.
        dtype: "float32", "float16" or "bfloat16", of weights, activations and cache.
        batch: more than 1 adds a graph that steps as many sessions at once, 0.1 MB; the state stays the same.
        force: replace an existing bundle.
        progress: called with a line for each step.

    Raises:
        TargetExistsError, StorageError, NoSpaceError: `target` cannot be written; nothing is left behind.
        CheckpointError: a weight that overflows `dtype`, named.
        InvalidArgumentError: an unknown dtype, or a batch out of range.
    """
    check_model_dtype(dtype)
    check_batch(batch)
    model, cache = checkpoint.geometry, checkpoint.config
    made_by = producer("lococo-export")
    with publish_directory(target, force=force) as directory:
        progress(f"weights ({dtype})")
        weights = WeightsFile(directory / WEIGHTS_NAME)
        try:
            write_weights(weights, model, checkpoint.tensors, _fusion_heads(checkpoint), dtype)
        finally:
            weights.close()
        specs = graph_specs(model, cache, dtype, batch)
        writer = GraphWriter(model, cache, dtype, weights, made_by)
        for spec in specs:
            progress(spec.file)
            writer.write(spec, directory)
        copied = [name for name in COPIED_FILES if (checkpoint.source_dir / name).is_file()]
        for name in copied:
            shutil.copyfile(checkpoint.source_dir / name, directory / name)
        progress("checksums")
        manifest = Manifest(
            producer=made_by,
            model=model,
            cache=cache,
            dtype=dtype,
            batch_size=1,
            graphs=specs,
            files=tuple(file_entry(directory, name) for name in (WEIGHTS_NAME, *(s.file for s in specs), *copied)),
            tokenizer={"files": [n for n in copied if n in TOKENIZER_FILES]} if "tokenizer.json" in copied else None,
            provenance=_provenance(checkpoint),
        )
        (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _fusion_heads(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Heads under the names the graphs use: fusion.{layer}.normalizer, fusion.{layer}.conv.{j}.weight / .bias."""
    tensors: dict[str, torch.Tensor] = {}
    for i, head in enumerate(checkpoint.heads):
        tensors[f"fusion.{i}.normalizer"] = torch.tensor([head.normalizer])
        for j, (weight, bias) in enumerate(head.convs):
            tensors[f"fusion.{i}.conv.{j}.weight"] = weight
            tensors[f"fusion.{i}.conv.{j}.bias"] = bias
    return tensors


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the bundle came from; nothing that changes from run to run."""
    return {"source": checkpoint.source_dir.name, "checkpoint_format": checkpoint.format}
