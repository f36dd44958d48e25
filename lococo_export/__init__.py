"""LoCoCo checkpoints to bundles: checkpoint reading, the reference model, static ONNX graphs."""

from .checkpoints import Checkpoint, load_checkpoint
from .export import export_bundle

__all__ = ["Checkpoint", "export_bundle", "load_checkpoint"]
