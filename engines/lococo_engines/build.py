"""A bundle's graphs to TensorRT plans, published whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from lococo_runtime._exceptions import (
    BackendError,
    CorruptError,
    InvalidArgumentError,
    LococoError,
    NotFoundError,
    OutOfMemoryError,
    TargetExistsError,
    UnsupportedError,
)
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import (
    WEIGHTS_NAME,
    GraphSpec,
    Manifest,
    TensorSpec,
    forward_widths,
    producer,
    publish_directory,
    read_manifest,
    sha256_file,
    storage_error,
)

from .gpu import Device, l4t_release, query_device
from .kernels import DTYPE_CODES, KernelNetwork, kernel_network, require_shapes
from .metadata import ENGINES_DIRECTORY, ENGINES_NAME, BuildOptions, Engines, PlanInfo
from .onnx_prepare import PreparedGraph, prepare_graph, weight_inputs
from .preflight import check_bundle, check_library, check_plans, plan_version, read_engines
from .progress import make_monitor
from .recipe import Recipe, load_recipe, recipe_for
from .toolkit import Toolkit, load_toolkit

_PREFIX = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
_HARDWARE_COMPATIBILITY = {"ampere+": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Target:
    """What plans are for.

    Attributes:
        sm: compute capabilities.
        device: the GPU they are built on; None ahead of time, with TensorRT for RTX.
    """

    sm: tuple[int, ...]
    device: Device | None


def choose(recipe: str, target: str | None, bundle: str | os.PathLike[str] = "BUNDLE") -> tuple[Recipe, Target]:
    """The recipe and the target that the flags --recipe and --target mean on this machine.

    Args:
        recipe: "auto", a name, or a .toml file.
        target: None for this machine's GPU, or "rtx:sm86,sm89": built ahead of time, no GPU needed.
        bundle: named in the advice that errors give.

    Raises:
        UnsupportedError: no GPU here, or one that the recipe is not for; says what to run where.
        InvalidArgumentError, NotFoundError, ConfigError: a target or recipe that does not exist.
    """
    if target is not None:
        chosen = load_recipe("rtx" if recipe == "auto" else recipe)
        return chosen, Target(_parse_target(target, chosen), None)
    named = None if recipe == "auto" else load_recipe(recipe)
    path = shlex.quote(os.fspath(bundle))
    try:
        device = query_device()
    except UnsupportedError as e:
        raise UnsupportedError(
            f"{e}\nEngines are built where they run: copy the bundle to that machine and run there:\n"
            f"  lococo-build {path}\n"
            "For RTX PCs they can be built here, without a GPU:\n"
            f"  pip install 'lococo-export[rtx]' && lococo-build {path} --target rtx:sm86,sm89,sm120"
        ) from e
    chosen = recipe_for(device) if named is None else named
    if device.sm not in chosen.sm:
        raise UnsupportedError(
            f"recipe {chosen.name}: expected a device of {_names(chosen.sm)}, found {device}; pass --recipe auto"
        )
    return chosen, Target((device.sm,), device)


def _parse_target(text: str, recipe: Recipe) -> tuple[int, ...]:
    """Compute capabilities of "rtx:sm86,sm89", ascending."""
    flavour, _, names = text.partition(":")
    sm = sorted({int(n[2:]) for n in names.split(",") if n[:2] == "sm" and n[2:].isdigit()})
    if flavour != "rtx" or len(sm) != len(names.split(",")):
        raise InvalidArgumentError(f"target: expected such as rtx:sm86,sm89,sm120, got {text!r}")
    if recipe.flavour != "tensorrt_rtx":
        raise InvalidArgumentError(
            f"recipe {recipe.name}: {recipe.flavour} builds on the device only; a target needs --recipe rtx"
        )
    if not set(sm) <= set(recipe.sm):
        raise UnsupportedError(f"target: recipe {recipe.name} offers {_names(recipe.sm)}, got {_names(tuple(sm))}")
    return tuple(sm)


def _names(sm: tuple[int, ...]) -> str:
    return ", ".join(f"sm{x}" for x in sm)


def engines_key(flavour: str, release: str, sm: tuple[int, ...], recipe: Recipe, num_layers: int | None) -> str:
    """Name of the directory of engines, such as trt-8.6.0-sm90 or rtx-1.7.1-sm86+sm89."""
    parts = [_PREFIX[flavour], release, "+".join(f"sm{x}" for x in sm)]
    if recipe.hardware_compatibility_level == "ampere+":
        parts.append("ampere+")
    if num_layers is not None:
        parts.append(f"{num_layers}layers")
    return "-".join(parts)


def build_engines(
    bundle: str | os.PathLike[str],
    recipe: Recipe,
    target: Target,
    *,
    timing_cache: str | os.PathLike[str] | None = None,
    num_layers: int | None = None,
    force: bool = False,
    verbose: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """Builds a plan for each graph into `bundle/engines/KEY`, whole or not at all; returns that directory.

    A second build of the same KEY waits for the first. Engines that are there already, built alike, are left alone.

    Args:
        bundle: as written by lococo-export; its files are not changed.
        recipe, target: from `choose`.
        timing_cache: file that carries TensorRT's measurements from build to build; None: in the user's cache folder.
        num_layers: keep only the first so many layers, for debugging; None for all.
        force: replace engines that are there.
        verbose: print TensorRT's own messages.
        progress: called with a line for each step.

    Raises:
        InvalidArgumentError: fewer layers than 1 or more than there are, or a timing cache for TensorRT for RTX.
        UnsupportedError: TensorRT or Polygraphy is missing, or lacks what the recipe or the bundle asks for.
        BackendError: TensorRT does not parse or build a graph; its reasons.
        CorruptError, NotFoundError: the bundle is damaged.
        TargetExistsError: engines built otherwise are there, and `force` is not given.
        StorageError, NoSpaceError: the bundle cannot be written to; nothing is left behind.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if num_layers is not None and not 1 <= num_layers <= manifest.model.num_layers:
        raise InvalidArgumentError(f"num_layers: expected 1 to {manifest.model.num_layers}, got {num_layers}")
    kit = load_toolkit(recipe.flavour, verbose=verbose)
    kit.require_dtype(manifest.dtype)
    if kit.strongly_typed and recipe.precision != "none":
        raise UnsupportedError(
            f"precision: expected none with TensorRT {kit.version}, which follows the ONNX's dtypes, got"
            f" {recipe.precision}; only 8.6 chooses them itself"
        )
    creator = None
    if recipe.kernels == "lococo":
        require_shapes(manifest)
        creator = kit.plugin_creator()
    options = BuildOptions(
        recipe=recipe.name,
        weights=recipe.weights,
        kernels=recipe.kernels,
        workspace_limit_bytes=recipe.workspace_bytes,
        builder_optimization_level=recipe.builder_optimization_level,
        precision=recipe.precision,
        hardware_compatibility_level=recipe.hardware_compatibility_level,
        version_compatible=recipe.version_compatible,
        strongly_typed=kit.strongly_typed,
        num_layers=num_layers,
    )
    directory = bundle / ENGINES_DIRECTORY / engines_key(kit.flavour, kit.release, target.sm, recipe, num_layers)
    with _build_lock(directory, progress):
        if directory.exists() and not force:
            _require_same(directory, kit, manifest, options, target)
            progress(f"{directory.name}: up to date; --force builds it again")
            return directory
        cache = _timing_cache_file(timing_cache, kit, target, progress)
        progress("checksums")
        check_files(bundle, manifest)
        with publish_directory(directory, force=force, marker=ENGINES_NAME) as staging:
            work = _Work(bundle, manifest, kit, options, target, cache, creator)
            if manifest.max_batch > 1:
                progress(
                    f"no engine of {manifest.max_batch} sessions: batches take the engine of one, session by session"
                )
            builder = kit.create_builder(target.device)
            plans = tuple(work.build(builder, spec, staging, progress) for spec in _chosen(manifest, recipe))
            with (staging / plans[0].plan).open("rb") as f:
                header = plan_version(f.read(64))
            engines = Engines(
                producer=producer("lococo-build"),
                bundle_id=manifest.bundle_id,
                flavour=kit.flavour,
                tensorrt_version=kit.version,
                plan_version=header,
                sm=target.sm,
                gpu_name=target.device.name if target.device else "",
                cuda_version=target.device.cuda_version if target.device else "",
                l4t=l4t_release() if target.device else "",
                options=options,
                state_bytes=manifest.state_bytes,
                plans=plans,
            )
            (staging / ENGINES_NAME).write_text(engines.to_json(), encoding="utf-8")
    return directory


def _chosen(manifest: Manifest, recipe: Recipe) -> list[GraphSpec]:
    """The graphs of the recipe's widths."""
    block = manifest.cache.block_size
    wanted = {1, block}
    if "short" in recipe.widths:
        wanted.update(forward_widths(block))
    return [g for g in manifest.graphs if g.tokens in wanted and g.batch == 1]


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Size and sha256 of the weights and of every graph.

    Raises:
        NotFoundError, CorruptError: naming the file.
    """
    graphs = {g.file for g in manifest.graphs}
    for entry in manifest.files:
        if entry.path != WEIGHTS_NAME and entry.path not in graphs:
            continue
        path = bundle / entry.path
        if not path.is_file():
            raise NotFoundError(f"{path}: not found; copy or export the bundle again")
        if path.stat().st_size != entry.nbytes or sha256_file(path) != entry.sha256:
            raise CorruptError(
                f"{path}: expected {entry.nbytes:,} bytes of sha256 {entry.sha256[:16]}..., got"
                f" {path.stat().st_size:,} others; copy or export the bundle again"
            )


def _require_same(directory: Path, kit: Toolkit, manifest: Manifest, options: BuildOptions, target: Target) -> None:
    """Engines that are there are sound and were built like this."""
    try:
        engines = read_engines(directory)
        check_bundle(directory, engines, manifest, partial=True)
        check_library(directory, engines, kit.flavour, kit.version)
        check_plans(directory, engines)
    except LococoError as e:
        raise TargetExistsError(f"{directory}: already exists, but: {e}; pass --force to build it again") from e
    old, new = dataclasses.asdict(engines.options), dataclasses.asdict(options)
    changes = [f"{name} {old[name]}, now {new[name]}" for name in old if old[name] != new[name]]
    if changes:
        raise TargetExistsError(
            f"{directory}: already exists, built with {'; '.join(changes)}; pass --force to replace it"
        )


@contextlib.contextmanager
def _build_lock(directory: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """One build of `directory` at a time; removes what a killed one left behind."""
    try:
        directory.parent.mkdir(exist_ok=True)
        lock = (directory.parent / f".{directory.name}.build.lock").open("w")
    except OSError as e:
        raise storage_error(e, directory.parent) from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{directory.name}: another lococo-build is at work on it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in directory.parent.glob(f".{directory.name}.*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        yield


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/lococo, by default ~/.cache/lococo. Raises RuntimeError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lococo"


def _timing_cache_file(
    given: str | os.PathLike[str] | None, kit: Toolkit, target: Target, progress: Callable[[str], None]
) -> Path | None:
    """The file, known to be writable; None where TensorRT keeps none, or for a default that cannot be written."""
    if target.device is None or kit.flavour == "tensorrt_rtx":  # TensorRT for RTX measures at load
        if given is not None:
            raise InvalidArgumentError("timing_cache_file: TensorRT for RTX has no timing cache; leave the flag out")
        return None
    gpu = "".join(c if c.isalnum() else "-" for c in target.device.name.lower())
    name = f"timing-{kit.version}-sm{target.device.sm}-{gpu}.cache"
    try:
        path = Path(given) if given else cache_directory() / name
    except RuntimeError:  # as in some containers
        progress("note: this user has no home: set XDG_CACHE_HOME; building without a timing cache, so the next build"
                 " is as slow")  # fmt: skip
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("r+b").close()
        tempfile.TemporaryFile(dir=path.resolve().parent).close()  # where it is written before it takes its place
    except OSError as e:
        if given is not None:
            raise storage_error(e, path) from e
        progress(f"note: {path}: {e.strerror}; building without a timing cache, so the next build is as slow")
        return None
    progress(f"timing cache {path}")
    return path


@contextlib.contextmanager
def _copy_of(cache: Path | None, folder: Path, progress: Callable[[str], None]) -> Iterator[str | None]:
    """A copy of the timing cache in `folder`, to be read and written, which then takes its place.

    So a build that is killed leaves a whole cache, and a plan that is built is not lost for want of one.
    """
    if cache is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copy = Path(scratch) / cache.name
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(cache, copy)
        yield os.fspath(copy)
        if not copy.exists():  # TensorRT kept none
            return
        try:
            with tempfile.TemporaryDirectory(prefix=".lococo-", dir=cache.resolve().parent) as beside:
                shutil.copyfile(copy, Path(beside) / cache.name)
                os.replace(Path(beside) / cache.name, cache.resolve())
        except OSError as e:
            progress(f"note: {storage_error(e, cache)}; the timing cache stays as it was")


@dataclass(frozen=True)
class _Work:
    """What all graphs of one build share."""

    bundle: Path
    manifest: Manifest
    kit: Toolkit
    options: BuildOptions
    target: Target
    timing_cache: Path | None
    creator: Any = None  # of the plugin; None with TensorRT's own kernels

    def build(self, builder: Any, spec: GraphSpec, staging: Path, progress: Callable[[str], None]) -> PlanInfo:
        """Builds one plan into `staging`."""
        start = time.perf_counter()
        path = self.bundle / spec.file
        graph: PreparedGraph | KernelNetwork
        if self.options.kernels == "lococo":
            weights = {w.name: w for w in weight_inputs(path)}
            graph = kernel_network(self.manifest, spec, weights, self.options.num_layers)
            network = self._assemble(builder, graph)
        else:
            graph = prepare_graph(path, spec, weights=self.options.weights, num_layers=self.options.num_layers)
            network = self._parse(builder, graph, path)
            if not self.options.strongly_typed and self.options.precision == "prefer":
                _pin_float32(self.kit.trt, network)
        plan = self._compile(builder, network, spec.name, staging, progress)
        name = f"{spec.name}.plan"
        with (staging / name).open("wb") as f:
            f.write(memoryview(plan))
        tensors, workspace = self._inspect(network, plan, path)
        _check_tensors(graph, tensors, path)
        info = PlanInfo(
            name=spec.name,
            kind=spec.kind,
            tokens=spec.tokens,
            plan=name,
            nbytes=plan.nbytes,
            sha256=hashlib.sha256(memoryview(plan)).hexdigest(),
            onnx=spec.file,
            onnx_sha256=next(f.sha256 for f in self.manifest.files if f.path == spec.file),
            constant_bytes=graph.constant_bytes if isinstance(graph, PreparedGraph) else 0,
            workspace_bytes=workspace,
            inputs=graph.inputs,
            outputs=graph.outputs,
            weights=graph.weights,
        )
        progress(
            f"{name}: {info.nbytes:,} bytes, {time.perf_counter() - start:.1f} s"
            + ("" if workspace is None else f", workspace {workspace:,} bytes")
            + f", peak host memory {memory_bytes('VmHWM') / 2**20:,.0f} MiB"
        )
        if self.target.device is not None:  # ahead of time it complains of the missing GPU, of course
            for message in self.kit.log.take_errors():
                progress(f"note: {spec.name}: TensorRT says: {message}")
        return info

    def _assemble(self, builder: Any, graph: KernelNetwork) -> Any:
        """A network of plugin nodes."""
        trt = self.kit.trt
        network = builder.create_network(self.kit.network_flags())
        tensors: dict[str, Any] = {}
        given = [*graph.inputs, *(TensorSpec(w.name, w.shape, w.dtype) for w in graph.weights)]
        for t in given:
            tensors[t.name] = network.add_input(t.name, self.kit.native_dtype(t.dtype), t.shape)
        dtypes = {t.name: t.dtype for t in given}
        for node in graph.nodes:
            dtypes.update((t.name, t.dtype) for t in node.outputs)
            names = [*node.inputs, *(t.name for t in node.outputs)]
            shapes = [n for t in node.outputs for n in (len(t.shape), *t.shape)]
            fields = [
                trt.PluginField("numbers", np.array(node.numbers, np.int32), trt.PluginFieldType.INT32),
                trt.PluginField("floats", np.array([node.eps, node.score_decay], np.float32),
                                trt.PluginFieldType.FLOAT32),
                trt.PluginField("dtypes", np.array([DTYPE_CODES[dtypes[n]] for n in names], np.int32),
                                trt.PluginFieldType.INT32),
                trt.PluginField("shapes", np.array(shapes, np.int32), trt.PluginFieldType.INT32),
            ]  # fmt: skip
            plugin = self.creator.create_plugin(node.name, trt.PluginFieldCollection(fields))
            if plugin is None:
                raise BackendError(f"{node.name}: the plugin refuses it; the note above says why")
            layer = network.add_plugin_v2([tensors[n] for n in node.inputs], plugin)
            layer.name = node.name
            for i, t in enumerate(node.outputs):
                tensors[t.name] = layer.get_output(i)
                tensors[t.name].name = t.name
        linear = 1 << int(trt.TensorFormat.LINEAR)
        for t in graph.outputs:
            network.mark_output(tensors[t.name])
            if not self.kit.strongly_typed:
                tensors[t.name].dtype = self.kit.native_dtype(t.dtype)  # else 8.6 converts it to float32
        for t in (*given, *graph.outputs):
            tensors[t.name].allowed_formats = linear
        return network

    def _parse(self, builder: Any, graph: PreparedGraph, path: Path) -> Any:
        network = builder.create_network(self.kit.network_flags())
        parser = self.kit.trt.OnnxParser(network, self.kit.log)
        if not parser.parse(graph.model, str(path)):  # the path leads it to the weights file
            reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BackendError(f"{path}: TensorRT {self.kit.version} does not parse it: {reasons}")
        return network

    def _compile(self, builder: Any, network: Any, label: str, staging: Path, progress: Callable[[str], None]) -> Any:
        """The plan, a trt.IHostMemory."""
        monitor = make_monitor(self.kit.trt, label)
        polygraphy_error = _polygraphy_error()
        cache = self.timing_cache
        try:
            with warnings.catch_warnings(), _copy_of(cache, staging, progress) as copy:
                warnings.simplefilter("ignore", DeprecationWarning)  # Polygraphy calls what newer versions deprecate
                config = self._config(builder, network, monitor, copy)
                plan = self.kit.polygraphy.engine_bytes_from_network(
                    (builder, network), config=config, save_timing_cache=copy
                )
        except (polygraphy_error, TypeError) as e:
            if monitor is not None and monitor.interrupted:
                raise KeyboardInterrupt from None
            reasons = self.kit.log.summary()
            if isinstance(e, TypeError):  # the bindings were handed a null pointer
                reasons += f" ({e}; if {cache} is a damaged timing cache, delete it)" if cache else f" ({e})"
            kind = OutOfMemoryError if "out of memory" in reasons.lower() else BackendError
            raise kind(f"{label}: TensorRT {self.kit.version} does not build it: {reasons}") from e
        return plan

    def _config(self, builder: Any, network: Any, monitor: Any, timing_cache: str | None) -> Any:
        kit, options = self.kit, self.options
        arguments: dict[str, Any] = {
            "memory_pool_limits": {kit.trt.MemoryPoolType.WORKSPACE: options.workspace_limit_bytes},
            "progress_monitor": monitor,
        }
        if options.builder_optimization_level is not None:
            arguments["builder_optimization_level"] = options.builder_optimization_level
        if options.version_compatible:
            kit.member("BuilderFlag", "VERSION_COMPATIBLE", "version_compatible")
            arguments["version_compatible"] = True
        if options.hardware_compatibility_level != "none":
            name = _HARDWARE_COMPATIBILITY[options.hardware_compatibility_level]
            level = kit.member("HardwareCompatibilityLevel", name, "hardware_compatibility_level")
            arguments["hardware_compatibility_level"] = level
        if timing_cache is not None and os.path.exists(timing_cache):
            arguments["load_timing_cache"] = timing_cache
        if options.kernels == "lococo" and hasattr(kit.trt, "TacticSource"):
            arguments["tactic_sources"] = []  # else 8.6 loads cuBLAS and cuDNN, for plugins that want them
        if not options.strongly_typed:  # 8.6 runs float16 only where a flag allows it
            arguments["fp16"] = self.manifest.dtype == "float16"
            if options.precision == "prefer":
                arguments["precision_constraints"] = "prefer"
        config = kit.polygraphy.create_config(builder, network, **arguments)
        with contextlib.suppress(AttributeError):
            config.clear_flag(kit.trt.BuilderFlag.TF32)  # float32 means float32
        if kit.flavour == "tensorrt_rtx":
            config.num_compute_capabilities = len(self.target.sm)
            for i, sm in enumerate(self.target.sm):
                config.set_compute_capability(kit.member("ComputeCapability", f"SM{sm}", f"sm{sm}"), i)
        return config

    def _inspect(self, network: Any, plan: Any, path: Path) -> tuple[dict[str, TensorSpec], int | None]:
        """Inputs and outputs as the engine reports them, and its workspace; ahead of time, those of the network."""
        kit = self.kit
        if self.target.device is None:
            ports = [network.get_input(i) for i in range(network.num_inputs)]
            ports += [network.get_output(i) for i in range(network.num_outputs)]
            return {p.name: TensorSpec(p.name, tuple(p.shape), kit.dtype(p.dtype)) for p in ports}, None
        runtime = kit.trt.Runtime(kit.log)  # must outlive the engine
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{path}: TensorRT {kit.version} does not load its own plan: {kit.log.summary()}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        tensors = {
            n: TensorSpec(n, tuple(engine.get_tensor_shape(n)), kit.dtype(engine.get_tensor_dtype(n))) for n in names
        }
        v2 = hasattr(engine, "device_memory_size_v2")  # from 10.1 on; 11 has no other
        return tensors, int(engine.device_memory_size_v2 if v2 else engine.device_memory_size)


def _polygraphy_error() -> type[Exception]:
    error: type[Exception] = import_module("polygraphy.exception").PolygraphyException
    return error


def _pin_float32(trt: Any, network: Any) -> None:
    """Asks TensorRT 8.6 to compute in float32 what the ONNX computes in float32."""
    left_alone = (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.CAST, trt.LayerType.IDENTITY)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type in left_alone:
            continue
        tensors = [layer.get_input(j) for j in range(layer.num_inputs)]
        tensors += [layer.get_output(j) for j in range(layer.num_outputs)]
        if all(t is None or t.dtype == trt.float32 for t in tensors):
            layer.precision = trt.float32


def _check_tensors(graph: PreparedGraph | KernelNetwork, found: dict[str, TensorSpec], path: Path) -> None:
    """The plan's inputs and outputs are the graph's."""
    weights = (TensorSpec(w.name, w.shape, w.dtype) for w in graph.weights)
    expected = {t.name: t for t in (*graph.inputs, *graph.outputs, *weights)}
    wrong = [
        f"{name}: expected {expected.get(name, 'none')}, got {found.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BackendError(f"{path}: the plan's inputs and outputs are not the graph's: {'; '.join(wrong[:5])}{more}")
