"""Bundles to TensorRT engines: recipes, building, and checks before TensorRT sees a plan. Needs no torch."""

try:
    import onnx  # noqa: F401
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"{e}; install what this package needs: pip install 'lococo-export[tensorrt]'") from e

from .build import Target, build_engines, choose
from .gpu import Device, query_device
from .metadata import Engines
from .preflight import check_engines, list_engines, read_engines
from .recipe import Recipe, load_recipe

__all__ = [
    "Device",
    "Engines",
    "Recipe",
    "Target",
    "build_engines",
    "check_engines",
    "choose",
    "list_engines",
    "load_recipe",
    "query_device",
    "read_engines",
]
