"""Checks of plans before TensorRT sees one, which answers a foreign or damaged plan with a hint at best."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from lococo_runtime._exceptions import CorruptError, NotFoundError, UnsupportedError, VersionError
from lococo_runtime.bundle import Manifest, read_bounded, read_manifest, sha256_file

from .metadata import ENGINES_DIRECTORY, ENGINES_NAME, Engines

_PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
JETSON_SM = (72, 87, 101, 110)  # "ampere+" plans do not run there
_HEADER = struct.Struct("<4sIQQ4B")  # magic, layout, ?, nbytes, version: 28 bytes


def plan_version(plan: bytes) -> str:
    """The TensorRT version in a plan's header, such as "10.3.0.26", or "" if the layout is not the known one.

    The layout is what `trtexec --getPlanVersionOnly` reads: a tag, 0, and the version's four numbers at byte 24.
    """
    if len(plan) < _HEADER.size:
        return ""
    magic, layout, _, _, *version = _HEADER.unpack_from(plan)
    return ".".join(map(str, version)) if magic[1:] == b"trt" and layout == 0 else ""


def release(version: str) -> tuple[str, ...]:
    """("8", "6", "0") of "8.6.0" and of "8.6.0.12"."""
    return tuple(version.split(".")[:3])


def list_engines(bundle: Path) -> list[Path]:
    """Engine directories of a bundle, sorted by name."""
    return sorted(p.parent for p in (bundle / ENGINES_DIRECTORY).glob(f"*/{ENGINES_NAME}") if p.parent.name[0] != ".")


def read_engines(directory: Path) -> Engines:
    """engines.json of `directory`; plans are not opened.

    Raises:
        NotFoundError: no such directory, or no engines.json in it.
        CorruptError, VersionError: see `Engines.from_json`.
    """
    path = directory / ENGINES_NAME
    try:
        return Engines.from_json(read_bounded(path), str(path))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise NotFoundError(f"{path}: not found; expected engines as written by lococo-build") from e
    except UnicodeDecodeError as e:
        raise CorruptError(f"{path}: not UTF-8 text: {e}; build the engines again") from e


def check_engines(
    directory: Path,
    *,
    flavour: str,
    tensorrt_version: str,
    sm: int,
    partial: bool = False,
) -> Engines:
    """Everything that can be known before TensorRT sees a plan; returns engines.json.

    Args:
        directory: `bundle/engines/KEY`.
        flavour, tensorrt_version: of the installed library.
        sm: compute capability of the device.
        partial: accept a debugging build of fewer layers.

    Raises:
        NotFoundError: a file that is missing.
        CorruptError: a plan of another size or sha256, or a header that contradicts engines.json.
        VersionError: another TensorRT or flavour of it.
        UnsupportedError: another compute capability.
    """
    engines = read_engines(directory)
    check_bundle(directory, engines, read_manifest(directory.parent.parent), partial=partial)
    check_library(directory, engines, flavour, tensorrt_version)
    check_device(directory, engines, sm)
    check_plans(directory, engines)
    return engines


def check_bundle(directory: Path, engines: Engines, manifest: Manifest, *, partial: bool = False) -> None:
    """The engines are of this bundle, of its graphs as they are now, and whole."""
    if engines.bundle_id != manifest.bundle_id:
        raise CorruptError(
            f"{directory}: built for bundle {engines.bundle_id[:16]}, found in bundle {manifest.bundle_id[:16]};"
            " run lococo-build --force on this bundle"
        )
    current = {f.path: f.sha256 for f in manifest.files}
    stale = [p.onnx for p in engines.plans if current.get(p.onnx) != p.onnx_sha256]
    if stale:
        raise CorruptError(
            f"{directory}: built from other versions of {', '.join(stale)}; run lococo-build --force on this bundle"
        )
    if engines.options.num_layers is not None and not partial:
        raise UnsupportedError(
            f"{directory}: built with --num-layers {engines.options.num_layers} of {manifest.model.num_layers}, for"
            " debugging; run lococo-build without it"
        )


def check_library(directory: Path, engines: Engines, flavour: str, tensorrt_version: str) -> None:
    """The installed TensorRT can read plans of the one that wrote these."""
    found = f"{_PRODUCTS.get(flavour, flavour)} {tensorrt_version}"
    needed = f"{_PRODUCTS.get(engines.flavour, engines.flavour)} {engines.tensorrt_version}"
    message = f"{directory}: built with {needed}, found {found}; install that version, or run lococo-build here"
    if flavour != engines.flavour:
        raise VersionError(message)
    here, there = release(tensorrt_version), release(engines.tensorrt_version)
    compatible = engines.options.version_compatible and [int(x) for x in here] >= [int(x) for x in there]
    if here != there and not compatible:
        raise VersionError(message)


def check_device(directory: Path, engines: Engines, sm: int) -> None:
    """The device runs code for what the plans were built for."""
    portable = engines.options.hardware_compatibility_level == "ampere+" and sm >= 80 and sm not in JETSON_SM
    if sm not in engines.sm and not portable:
        raise UnsupportedError(
            f"{directory}: built for {_names(engines.sm)}, found a device of sm{sm}; run lococo-build on the device"
        )


def check_plans(directory: Path, engines: Engines) -> None:
    """Size, sha256 and header of every plan."""
    for p in engines.plans:
        path = directory / p.plan
        if not path.is_file():
            raise NotFoundError(f"{path}: not found; run lococo-build --force")
        nbytes = path.stat().st_size
        if nbytes != p.nbytes:
            raise CorruptError(f"{path}: expected {p.nbytes:,} bytes, got {nbytes:,}; run lococo-build --force")
        with path.open("rb") as f:
            version = plan_version(f.read(_HEADER.size))
        if version != engines.plan_version:
            raise VersionError(
                f"{path}: expected the header of TensorRT {engines.plan_version or 'of an unknown layout'}, got"
                f" {version or 'an unknown one'}; run lococo-build --force"
            )
        if engines.plan_version and not engines.options.version_compatible:
            check_header_version(path, engines)
        digest = sha256_file(path)
        if digest != p.sha256:
            raise CorruptError(f"{path}: expected sha256 {p.sha256}, got {digest}; run lococo-build --force")


def check_header_version(path: Path, engines: Engines) -> None:
    """engines.json cannot claim another version than the plan's own header."""
    if release(engines.plan_version) != release(engines.tensorrt_version):
        raise VersionError(
            f"{path}: its header says TensorRT {engines.plan_version}, {ENGINES_NAME} says"
            f" {engines.tensorrt_version}; run lococo-build --force"
        )


def _names(sm: Iterable[int]) -> str:
    return ", ".join(f"sm{x}" for x in sm)
