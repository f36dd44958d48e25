"""lococo-build."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from lococo_runtime._exceptions import InvalidArgumentError
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import read_manifest
from lococo_runtime.cli import guarded, show_step

from .build import build_engines, choose
from .metadata import Engines
from .preflight import read_engines
from .recipe import HARDWARE_COMPATIBILITY, KERNELS, WEIGHTS, builtin_recipes, parse_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-build."""
    parser = argparse.ArgumentParser(
        prog="lococo-build", description="Build TensorRT engines for a bundle, on the device they are for."
    )
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument(
        "--recipe",
        default="auto",
        metavar="NAME",
        help=f"auto (default, by the GPU), {', '.join(builtin_recipes())}, or a .toml file",
    )
    parser.add_argument("--target", metavar="rtx:SM,SM", help="build ahead of time for RTX PCs, such as rtx:sm86,sm89")
    parser.add_argument("--timing-cache-file", type=Path, metavar="F", help="default: in the user's cache folder")
    parser.add_argument("--builder-optimization-level", type=int, metavar="N", help="0 (quick build) to 5")
    parser.add_argument("--mem-pool-size", metavar="workspace:N", help="most scratch memory, such as workspace:512M")
    parser.add_argument("--hardware-compatibility-level", choices=HARDWARE_COMPATIBILITY, help="for other GPUs")
    parser.add_argument("--version-compatible", action="store_true", default=None, help="for other TensorRT versions")
    parser.add_argument(
        "--precision", choices=("none", "prefer"), help="TensorRT 8.6 only: prefer float32 where the ONNX has it"
    )
    parser.add_argument("--weights", choices=WEIGHTS, help="one copy for all plans, or constants in each")
    parser.add_argument(
        "--kernels", choices=KERNELS, help="lococo: this project's plugin; tensorrt: TensorRT's own, from the ONNX"
    )
    parser.add_argument("--num-layers", type=int, metavar="N", help="only the first N layers, for debugging")
    parser.add_argument("--force", action="store_true", help="replace engines that are there")
    parser.add_argument("--verbose", action="store_true", help="print TensorRT's own messages")
    args = parser.parse_args(argv)
    return guarded(lambda: _build(args))


def _build(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    read_manifest(args.bundle)  # a wrong path is the likelier mistake: say so first
    workspace_bytes = _workspace(args.mem_pool_size) if args.mem_pool_size else None
    recipe, target = choose(args.recipe, args.target, args.bundle)
    recipe = recipe.replace(
        builder_optimization_level=args.builder_optimization_level,
        workspace_bytes=workspace_bytes,
        hardware_compatibility_level=args.hardware_compatibility_level,
        version_compatible=args.version_compatible,
        precision=args.precision,
        weights=args.weights,
        kernels=args.kernels,
    )
    where = str(target.device) if target.device else "ahead of time for " + ", ".join(f"sm{x}" for x in target.sm)
    show_step(f"recipe {recipe.name}: {where}")
    directory = build_engines(
        args.bundle,
        recipe,
        target,
        timing_cache=args.timing_cache_file,
        num_layers=args.num_layers,
        force=args.force,
        verbose=args.verbose,
        progress=show_step,
    )
    print(f"{directory}: {describe(read_engines(directory))}, {time.perf_counter() - start:.1f} s,"
          f" peak host memory {memory_bytes('VmHWM') / 2**20:,.0f} MiB")  # fmt: skip
    return 0


def describe(engines: Engines) -> str:
    """What the engines take, in bytes."""
    plans = sum(p.nbytes for p in engines.plans)
    text = f"{len(engines.plans)} plans of {plans:,} bytes in all, shared weights {engines.weights_span[1]:,} bytes,"
    if engines.device_bytes is None:
        return f"{text} state {engines.state_bytes:,} bytes a session, workspace known on the device"
    return (
        f"{text} {engines.session_bytes:,} bytes a session, state {engines.state_bytes:,} and workspace"
        f" {engines.workspace_bytes:,} of them: {engines.device_bytes:,} bytes of device memory with one session"
    )


def _workspace(text: str) -> int:
    """Bytes of "workspace:2G"."""
    pool, _, size = text.partition(":")
    if pool != "workspace":
        raise InvalidArgumentError(f"mem_pool_size: expected workspace:N, such as workspace:2G, got {text!r}")
    return parse_bytes(size, "mem_pool_size")
