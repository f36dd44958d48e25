"""LoCoCo checkpoints to bundles: checkpoint reading, the reference model, static ONNX graphs."""

try:
    import onnx  # noqa: F401
    import safetensors  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"{e}; install what this package needs: pip install 'lococo-export[export]'") from e

from .checkpoints import Checkpoint, load_checkpoint
from .export import export_bundle

__all__ = ["Checkpoint", "export_bundle", "load_checkpoint"]
