"""Recipes: how engines are built for a device, one small TOML file each (docs/engines.md)."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lococo_runtime._exceptions import ConfigError, InvalidArgumentError, NotFoundError, UnsupportedError

from .gpu import Device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLAVOURS = ("tensorrt", "tensorrt_rtx")
WEIGHTS = ("shared", "embedded")
WIDTHS = ("single", "short", "block")
PRECISIONS = ("none", "prefer")
KERNELS = ("tensorrt", "lococo")
HARDWARE_COMPATIBILITY = ("none", "ampere+", "same_compute_capability")

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def parse_bytes(text: str, what: str) -> int:
    """Bytes of "512M" or "2G"; the unit is required, because tools disagree on what a bare number means."""
    match = re.fullmatch(r"([0-9]+)([KMG])(i?B)?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise InvalidArgumentError(f'{what}: expected a size with a unit, such as "512M" or "2G", got {text!r}')
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True)
class Recipe:
    """How engines are built. Validates once, on construction.

    Attributes:
        name: of the recipe.
        flavour: "tensorrt" or "tensorrt_rtx", also the name of the Python module.
        sm: compute capabilities it is for, 90 for 9.0.
        widths: decoder and fusion graphs to build: "single" (one token) and "block" always, "short" optionally.
        weights: "shared": one device copy, given to every plan as inputs; "embedded": constants of each plan.
        kernels: "lococo": this project's plugin, with shared weights; "tensorrt": TensorRT's own, from the ONNX.
        workspace_bytes: the most scratch memory a plan may use.
        builder_optimization_level: 0 (quick build) to 5; None leaves it to TensorRT.
        precision: TensorRT 8.6 only, which chooses precisions itself: "prefer" asks it to run in float32 what the ONNX
            says is float32; "none" lets it choose. Newer ones follow the ONNX.
        hardware_compatibility_level: "none", "ampere+" or "same_compute_capability".
        version_compatible: plans that load in other TensorRT versions of the same flavour.
        max_device_memory_bytes: for `auto`: only for devices with at most so much memory; None for all.

    Raises:
        ConfigError: naming the field, what was expected and what was given.
    """

    name: str
    flavour: str
    sm: tuple[int, ...]
    widths: tuple[str, ...]
    weights: str
    workspace_bytes: int
    kernels: str = "tensorrt"
    builder_optimization_level: int | None = None
    precision: str = "none"
    hardware_compatibility_level: str = "none"
    version_compatible: bool = False
    max_device_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("flavour", FLAVOURS),
            ("weights", WEIGHTS),
            ("kernels", KERNELS),
            ("precision", PRECISIONS),
            ("hardware_compatibility_level", HARDWARE_COMPATIBILITY),
        ):
            value = getattr(self, name)
            self._require(value in choices, name, f"one of {', '.join(choices)}", value)
        integers = all(type(x) is int and x >= 50 for x in self.sm)
        self._require(bool(self.sm) and integers, "sm", "compute capabilities such as [87]", list(self.sm))
        self._require(set(self.widths) <= set(WIDTHS), "widths", f"some of {', '.join(WIDTHS)}", list(self.widths))
        self._require({"single", "block"} <= set(self.widths), "widths", "single and block in it", list(self.widths))
        effort = self.builder_optimization_level
        allowed = effort is None or (type(effort) is int and 0 <= effort <= 5)
        self._require(allowed, "builder_optimization_level", "0 to 5", effort)
        self._require(type(self.version_compatible) is bool, "version_compatible", "a boolean", self.version_compatible)
        if self.flavour == "tensorrt_rtx":
            level, why = self.hardware_compatibility_level, " (TensorRT for RTX names its targets instead)"
            self._require(level == "none", "hardware_compatibility_level", f"none{why}", level)
            self._require(not self.version_compatible, "version_compatible", "false with TensorRT for RTX", True)
            why = " (TensorRT for RTX takes no such plugins)"
            self._require(self.kernels == "tensorrt", "kernels", f"tensorrt{why}", self.kernels)
            why = " (TensorRT for RTX follows the ONNX's dtypes)"
            self._require(self.precision == "none", "precision", f"none{why}", self.precision)
        if self.kernels == "lococo":
            why = " (--kernels tensorrt takes either)"
            self._require(self.weights == "shared", "weights", f"shared with kernels lococo{why}", self.weights)
            why = " (they compute in the bundle's dtype)"
            self._require(self.precision == "none", "precision", f"none with kernels lococo{why}", self.precision)
            why = " (--kernels tensorrt makes such plans)"
            self._require(not self.version_compatible, "version_compatible", f"false with kernels lococo{why}", True)

    def _require(self, condition: bool, field: str, expected: str, got: object) -> None:
        if not condition:
            raise ConfigError(f"recipe {self.name}: {field}: expected {expected}, got {got!r}")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with the fields of `changes` that are not None."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})


def parse_recipe(text: str, name: str) -> Recipe:
    """A recipe from TOML.

    Raises:
        ConfigError: not TOML, a key that is unknown or missing, or a wrong value.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"recipe {name}: not valid TOML: {e}") from e
    for key, field in (("workspace", "workspace_bytes"), ("max_device_memory", "max_device_memory_bytes")):
        if key in values:
            values[field] = parse_bytes(str(values.pop(key)), f"recipe {name}: {key}")
    for key in ("sm", "widths"):
        if not isinstance(values.get(key, []), list):
            raise ConfigError(f"recipe {name}: {key}: expected a list, got {values[key]!r}")
        if key in values:
            values[key] = tuple(values[key])
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(Recipe) if f.name != "name"}
    unknown = sorted(values.keys() - fields.keys())
    missing = sorted({f for f, required in fields.items() if required} - values.keys())
    if unknown or missing:
        raise ConfigError(
            f"recipe {name}: expected {', '.join(f.removesuffix('_bytes') for f in fields)};"
            f" unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        )
    return Recipe(name=name, **values)


def builtin_recipes() -> dict[str, Recipe]:
    """Every recipe that comes with the package, by name."""
    directory = resources.files(__package__).joinpath("recipes")
    files = {f.name.removesuffix(".toml"): f for f in directory.iterdir() if f.name.endswith(".toml")}
    return {name: parse_recipe(files[name].read_text(encoding="utf-8"), name) for name in sorted(files)}


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a file whose name ends in .toml.

    Raises:
        NotFoundError: no such recipe; lists those there are.
        ConfigError: as `parse_recipe`.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), path.stem)
        except OSError as e:
            raise NotFoundError(f"{path}: {e.strerror}; expected a recipe file") from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path}: not UTF-8 text: {e}") from e
    recipes = builtin_recipes()
    if name not in recipes:
        raise NotFoundError(f"recipe: expected auto, {', '.join(recipes)} or a .toml file, got {name!r}")
    return recipes[name]


def recipe_for(device: Device) -> Recipe:
    """The recipe made for `device`: its compute capability, and the tightest memory limit that fits.

    Raises:
        UnsupportedError: none is; lists what each is for.
    """
    recipes = builtin_recipes()
    fitting = [
        r
        for r in recipes.values()
        if device.sm in r.sm and device.total_bytes <= (r.max_device_memory_bytes or device.total_bytes)
    ]
    if not fitting:
        known = "; ".join(f"{r.name} for {', '.join(f'sm{x}' for x in r.sm)}" for r in recipes.values())
        raise UnsupportedError(
            f"no recipe for {device}: there are {known}. Copy the nearest one, set its sm, and pass it as"
            " --recipe FILE.toml"
        )
    return min(fitting, key=lambda r: r.max_device_memory_bytes or sys.maxsize)
