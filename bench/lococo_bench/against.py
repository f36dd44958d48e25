"""The same tests by PyTorch: our reference model and transformers, eager and compiled. Needs torch.

All of them decode greedily, one token after the other, with the token chosen on the device.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lococo_runtime import InvalidArgumentError, NotFoundError, UnsupportedError
from lococo_runtime.bundle import Manifest

from .device import Device
from .measure import Clock, Plan, Row, installed_version, summary_ms, timing

if TYPE_CHECKING:
    from torch import Tensor

    from lococo_export.reference import ReferenceModel

SECONDS = 5.0  # repetitions end after this, but not before the first
CHUNK = 4096  # tokens read at once on the way to a depth
KEPT = (
    *("build_commit", "version", "cpu_info", "gpu_info", "driver_version", "cuda_version", "power_mode", "clocks"),
    *("device", "model_filename", "model_type", "model_size", "model_n_params", "policy", "mem_size", "n_batch"),
    "copy_bytes_per_second",
)
MAX_DEPTH = 65536  # of transformers, whose cache grows
IMPLEMENTATIONS = ("transformers-dynamic", "transformers-static-compile", "reference-eager", "reference-compile")


def import_torch() -> Any:
    """torch, once all that --against torch needs is there.

    Raises:
        NotFoundError: naming what is missing.
    """
    try:
        importlib.import_module("transformers")
        importlib.import_module("lococo_export")
        return importlib.import_module("torch")
    except ImportError as e:
        raise NotFoundError(f"--against torch: {e}; pip install 'lococo-export[export]'") from e


def check_implementations(names: Sequence[str]) -> None:
    """Raises InvalidArgumentError for a name that is not of `IMPLEMENTATIONS`."""
    if wrong := [name for name in names if name not in IMPLEMENTATIONS]:
        raise InvalidArgumentError(
            f"--against: expected torch, or some of {', '.join(IMPLEMENTATIONS)}, got {wrong[0]!r}"
        )


class Against:
    """Measures PyTorch on the checkpoint that a bundle was made from.

    Args:
        manifest: the bundle's.
        checkpoint: a directory that lococo-export and transformers can read.
        device: where to run.
        common: what the rows of the bundle have in common.
        implementations: of `IMPLEMENTATIONS`, all of them by default.
        max_depth: transformers is not run at larger depths.
        progress: told what begins, and what is left out.

    Raises:
        NotFoundError: torch or transformers is missing.
        ConfigError: another checkpoint than the bundle's.
        UnsupportedError: transformers cannot load it.
    """

    def __init__(
        self,
        manifest: Manifest,
        checkpoint: str | os.PathLike[str],
        device: Device,
        common: Row,
        *,
        implementations: Sequence[str] = IMPLEMENTATIONS,
        max_depth: int = MAX_DEPTH,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        check_implementations(implementations)
        self._torch, self.implementations = import_torch(), implementations
        from lococo_export.reference import ReferenceModel
        from lococo_export.verify import checkpoint_of

        self.manifest, self.max_depth, self.progress = manifest, max_depth, progress
        self._clock = Clock(device)
        self._name = "cpu" if device.index is None else f"cuda:{device.index}"
        self._dtype = getattr(self._torch, manifest.dtype)
        self.common: Row = {
            **{k: common.get(k) for k in KEPT},
            "backend": "torch",
            "torch_version": self._torch.__version__,
            "torch_cuda_version": self._torch.version.cuda,
            "transformers_version": installed_version("transformers"),
        }
        self._reference = ReferenceModel(checkpoint_of(manifest, checkpoint), self._dtype, self._name)
        self._transformers = self._load_transformers(checkpoint)
        self._reference_steps: dict[str, _ReferenceSteps] = {}

    def run(self, plan: Plan) -> Iterator[Row]:
        """Rows of every implementation: prompts into an empty cache, generation at every depth."""
        for n in plan.n_prompt:
            for implementation in sorted({*self.implementations} & {"transformers-dynamic", "reference-eager"}):
                self.progress(f"{implementation}: {n} tokens of prompt")
                yield self._row(implementation, 0, self._prompt(implementation, n, plan.repetitions))
        for implementation in self.implementations:
            for depth in plan.n_depth:
                if implementation.startswith("transformers") and depth > self.max_depth:
                    self.progress(f"{implementation}: depth {depth} is left out: more than {self.max_depth}")
                    continue
                for n in plan.n_gen:
                    self.progress(f"{implementation}: {n} tokens generated at depth {depth}")
                    yield self._row(implementation, depth, self._decode(implementation, n, depth, plan.repetitions))

    def _row(self, implementation: str, depth: int, measured: Row) -> Row:
        by = "position" if implementation.startswith("reference") else "prefill"
        return {
            "implementation": implementation,
            **self.common,
            **measured,
            "n_depth": depth,
            "depth_by": by if depth else "prefill",
        }

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prompt(self, implementation: str, n: int, repetitions: int) -> Row:
        ids = self._random(n)
        read = self._read_reference if implementation.startswith("reference") else self._read_transformers
        self._reset_memory()
        with self._torch.no_grad():
            samples = self._repeat(lambda: int(read(ids).argmax()), repetitions)
        ms = [ns / 1e6 for ns in samples[1:]]
        measured = timing(samples[1:], samples[0], n)
        return {"n_prompt": n, "n_gen": 0, **measured, "ttft_ms": summary_ms(ms), **self._memory()}

    def _read_reference(self, ids: Tensor) -> Tensor:
        from lococo_export.reference import ReferenceSession

        return ReferenceSession(self._reference).prefill(ids)

    def _read_transformers(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._transformers(ids, past_key_values=self._dynamic_cache(), logits_to_keep=1).logits[:, -1]
        return logits

    # --- generation --------------------------------------------------------------------------------------------------

    def _decode(self, implementation: str, n: int, depth: int, repetitions: int) -> Row:
        self._reset_memory()
        steps: _ReferenceSteps | None = None
        # no_grad, not inference_mode: compiled code writes to tensors that were made here
        with self._torch.no_grad():
            if implementation.startswith("reference"):
                if implementation not in self._reference_steps:  # compiled once for every depth
                    compiled = implementation.endswith("compile")
                    self._reference_steps[implementation] = _ReferenceSteps(self._torch, self._reference, compiled)
                steps = self._reference_steps[implementation]
                steps.start(depth)
                step: Callable[[], object] = steps
            elif implementation == "transformers-dynamic":
                step = self._transformers_steps(self._transformers, self._dynamic_cache(), depth)
            else:
                step = self._static_steps(depth, n * (repetitions + 1))

            def generate() -> None:
                for _ in range(n):
                    step()

            samples = self._repeat(generate, repetitions)
            row = {"n_prompt": 0, "n_gen": n, **timing(samples[1:], samples[0], n)}
            if steps is not None:
                row |= steps.apart(self._clock, n)
        return {**row, **self._memory()}

    def _transformers_steps(self, forward: Any, cache: Any, depth: int) -> Callable[[], object]:
        """Reads `depth` tokens, at least one, eagerly; then a call of the result is a step."""
        torch = self._torch
        for first in range(0, max(depth, 1), CHUNK):
            ids = self._random(min(CHUNK, max(depth, 1) - first))
            out = self._transformers(ids, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)

        def step() -> None:
            nonlocal token
            torch.compiler.cudagraph_mark_step_begin()
            # a tensor of its own: the graph's output is overwritten by the next step
            token = forward(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

        return step

    def _static_steps(self, depth: int, tokens: int) -> Callable[[], object]:
        from transformers import StaticCache

        self._torch.compiler.reset()  # another depth is another shape, which must not become a dynamic one
        cache = StaticCache(config=self._transformers.config, max_cache_len=max(depth, 1) + tokens)
        compiled = self._torch.compile(
            self._transformers.forward, mode="reduce-overhead", fullgraph=True, dynamic=False
        )
        return self._transformers_steps(compiled, cache, depth)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _load_transformers(self, checkpoint: str | os.PathLike[str]) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self._dtype)
        except (OSError, ValueError) as e:
            raise UnsupportedError(f"{checkpoint}: transformers cannot load it: {e}") from e
        return model.to(self._name).eval()

    def _dynamic_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._transformers.config)

    def _random(self, n: int) -> Tensor:
        ids: Tensor = self._torch.randint(0, self.manifest.model.vocab_size, (1, n), device=self._name)
        return ids

    def _repeat(self, call: Callable[[], object], repetitions: int) -> list[int]:
        """Nanoseconds: of a warm-up, then of the repetitions that fit into the time, one at least."""
        samples = [self._clock.ns(call)]
        while len(samples) <= repetitions and (len(samples) < 2 or sum(samples[1:]) < SECONDS * 1e9):
            samples.append(self._clock.ns(call))
        return samples

    def _reset_memory(self) -> None:
        if self._name != "cpu":
            self._torch.cuda.empty_cache()
            self._torch.cuda.reset_peak_memory_stats(self._name)

    def _memory(self) -> Row:
        """Of all tensors, both models' weights included; None on a CPU, where nobody counts them apart."""
        if self._name == "cpu":
            return {"peak_memory_bytes": None, "memory_by": None}
        other = self._weights_of_the_other()
        peak = int(self._torch.cuda.max_memory_allocated(self._name))
        return {"peak_memory_bytes": peak - other, "memory_by": "torch-allocated"}

    def _weights_of_the_other(self) -> int:
        """Weights are loaded twice, once for each implementation; one of them has no part in a measurement."""
        return min(sum(p.nbytes for p in m.parameters()) for m in (self._reference, self._transformers))


def compile_by_layer(torch: Any, model: ReferenceModel) -> ReferenceModel:
    """A copy over the same weights whose layers run compiled: one compilation for all layers, and two for updates.

    Inductor takes minutes for the steps of 30 layers as one graph, most of all for those with fusions.
    """
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in copied.model.layers:
        layer.compile(dynamic=False, fullgraph=True)
    # a number would be compiled in, layer by layer; a tensor without dimensions computes the same
    copied.heads = [replace(h, normalizer=torch.tensor(h.normalizer, device=model.device)) for h in copied.heads]
    copied.update_layer = torch.compile(model.update_layer, dynamic=False, fullgraph=True)
    return copied


class _ReferenceSteps:
    """Greedy steps of the reference model, over tensors of their own; compiled ones are CUDA graphs on a GPU."""

    def __init__(self, torch: Any, model: ReferenceModel, compiled: bool) -> None:
        from lococo_export.verify import copy_state, to_device

        self.copy_state = copy_state
        self.torch, self.model = torch, compile_by_layer(torch, model) if compiled else model
        self.capacity, self.mem_size = model.cache.capacity, model.cache.mem_size
        self.live = 0
        self.state = to_device(model.empty_state(), model.device, copy=True)
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.graphs: dict[bool, Any] = {}
        if compiled and model.device.type == "cuda":
            from lococo_export.cuda_graphs import capture

            self.graphs = {fuse: capture(functools.partial(self._step, fuse), model.device) for fuse in (False, True)}

    def start(self, depth: int) -> None:
        """At a position, with as many live slots as there may be; their contents do not matter to the time."""
        self.live = min(depth, self.mem_size)
        self.copy_state(self.state, self.model.empty_state())
        self.state.length.fill_(self.live)
        self.state.position.fill_(depth)
        self.ids.zero_()

    def __call__(self) -> None:
        """One step."""
        fuse = self.live + 1 > self.capacity
        if self.graphs:
            self.graphs[fuse].replay()
        else:
            self._step(fuse)
        self.live = self.mem_size if fuse else self.live + 1

    def apart(self, clock: Clock, n: int) -> Row:
        """Steps timed one by one, n of them and at least two windows, with and without a fusion apart."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(max(n, 2 * (self.capacity - self.mem_size + 1))):
            fuse = self.live + 1 > self.capacity
            times[fuse].append(clock.ns(self) / 1e6)
        return {
            "plain_step_ms": summary_ms(times[False]) if times[False] else None,
            "fusion_step_ms": summary_ms(times[True]) if times[True] else None,
        }

    def _step(self, fuse: bool) -> None:
        result = self.model(self.ids, self.state, return_all=False)
        self.copy_state(self.state, self.model.update(self.state, result, fuse=fuse))
        self.ids.copy_(result.logits.argmax(-1))
