"""engines.json: what a directory of plans is, for whom, and what it needs (docs/engines.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from lococo_runtime._exceptions import CorruptError, VersionError
from lococo_runtime.bundle import DTYPE_BYTES, TensorSpec, parse_json

ENGINES_NAME = "engines.json"
ENGINES_DIRECTORY = "engines"  # in a bundle; one directory for each key in it
FORMAT_NAME = "lococo-engines"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class WeightInput:
    """A weight that a plan takes as an input: bytes offset..offset+nbytes of the bundle's weights file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlanInfo:
    """One plan.

    Attributes:
        name, kind, tokens: as in lococo.json.
        plan, nbytes, sha256: its file, beside engines.json.
        onnx, onnx_sha256: the bundle's graph it was built from.
        constant_bytes: weights stored in the plan.
        workspace_bytes: device memory of one execution context; None where only the device will know.
        inputs, outputs: without the weights.
        weights: inputs to bind to the device copy of the weights.
    """

    name: str
    kind: str
    tokens: int
    plan: str
    nbytes: int
    sha256: str
    onnx: str
    onnx_sha256: str
    constant_bytes: int
    workspace_bytes: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightInput, ...]


@dataclass(frozen=True)
class BuildOptions:
    """What the builder was told.

    Attributes:
        weights, kernels, workspace_limit_bytes, builder_optimization_level, precision, hardware_compatibility_level,
        version_compatible: as in a recipe.
        strongly_typed: TensorRT followed the ONNX's dtypes; False on 8.6, which chooses.
        num_layers: None, or how many layers a debugging build has.
    """

    recipe: str
    weights: str
    kernels: str
    workspace_limit_bytes: int
    builder_optimization_level: int | None
    precision: str
    hardware_compatibility_level: str
    version_compatible: bool
    strongly_typed: bool
    num_layers: int | None


@dataclass(frozen=True)
class Engines:
    """engines.json, whole.

    Attributes:
        producer: the program and its version.
        bundle_id: of the bundle that the plans belong to.
        flavour: "tensorrt" or "tensorrt_rtx".
        tensorrt_version: as the library says it, such as "8.6.0" or "1.7.1.116".
        plan_version: from the plans' header, such as "8.6.0.12"; "" where its layout is not known.
        sm: compute capabilities the plans are for.
        gpu_name, cuda_version, l4t: where they were built; "" where there was no GPU, or no Jetson.
        options: what they were built with.
        state_bytes: of one session's state, as in lococo.json.
        plans: one a graph.
    """

    producer: str
    bundle_id: str
    flavour: str
    tensorrt_version: str
    plan_version: str
    sm: tuple[int, ...]
    gpu_name: str
    cuda_version: str
    l4t: str
    options: BuildOptions
    state_bytes: int
    plans: tuple[PlanInfo, ...]

    @property
    def weights_span(self) -> tuple[int, int]:
        """(offset, nbytes): the part of the weights file that one device copy must hold; nbytes 0 if embedded."""
        weights = [w for p in self.plans for w in p.weights]
        if not weights:
            return 0, 0
        first = min(w.offset for w in weights)
        return first, max(w.offset + w.nbytes for w in weights) - first

    @property
    def constant_bytes(self) -> int:
        """Weights stored in plans, summed over the plans."""
        return sum(p.constant_bytes for p in self.plans)

    @property
    def workspace_bytes(self) -> int | None:
        """Of the plan that needs most: contexts of one session run one after another and can share it."""
        known = [p.workspace_bytes for p in self.plans]
        return None if None in known else max(x for x in known if x is not None)

    @property
    def session_bytes(self) -> int | None:
        """Device memory of one session: its state, what a fusion makes of it, what a forward leaves, the workspace."""
        made: dict[str, int] = {}
        for t in (t for p in self.plans if p.kind == "decoder" for t in p.outputs if t.name != "logits"):
            made[t.name] = max(made.get(t.name, 0), t.nbytes)
        workspace = self.workspace_bytes
        return None if workspace is None else 2 * self.state_bytes + sum(made.values()) + workspace

    @property
    def device_bytes(self) -> int | None:
        """Device memory of plans, weights and one session, CUDA's own context left out."""
        session = self.session_bytes
        return None if session is None else sum(p.nbytes for p in self.plans) + self.weights_span[1] + session

    def to_json(self) -> str:
        """The exact bytes of engines.json (UTF-8): two-space indent, fixed key order, one newline at the end."""
        offset, nbytes = self.weights_span
        document = {
            "format": FORMAT_NAME,
            "schema_version": SCHEMA_VERSION,
            **{
                name: getattr(self, name)
                for name in ("producer", "bundle_id", "flavour", "tensorrt_version", "plan_version")
            },
            "sm": list(self.sm),
            "gpu_name": self.gpu_name,
            "cuda_version": self.cuda_version,
            "l4t": self.l4t,
            "options": dataclasses.asdict(self.options),
            "state_bytes": self.state_bytes,
            "workspace_bytes": self.workspace_bytes,
            "session_bytes": self.session_bytes,
            "device_bytes": self.device_bytes,
            "constant_bytes": self.constant_bytes,
            "weights_offset": offset,
            "weights_bytes": nbytes,
            "plans": [_plan_json(p) for p in self.plans],
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = ENGINES_NAME) -> Engines:
        """Parses and checks engines.json.

        Raises:
            CorruptError: not JSON, a missing field, a wrong type, or a derived field that contradicts the rest.
            VersionError: a schema version this release does not know.
        """
        d = parse_json(text, source, "build the engines again")
        if not isinstance(d, dict) or d.get("format") != FORMAT_NAME:
            raise CorruptError(f'{source}: expected "format": "{FORMAT_NAME}"; build the engines again')
        if d.get("schema_version") != SCHEMA_VERSION:
            raise VersionError(
                f"{source}: schema_version: expected {SCHEMA_VERSION}, got {d.get('schema_version')!r};"
                " build the engines again with this release"
            )
        try:
            engines = cls(
                **{f.name: d[f.name] for f in dataclasses.fields(cls) if f.name not in ("sm", "options", "plans")},
                sm=tuple(d["sm"]),
                options=BuildOptions(**d["options"]),
                plans=tuple(_plan_from(p) for p in d["plans"]),
            )
            _check(engines)
            same = json.loads(engines.to_json()) == d
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise CorruptError(f"{source}: malformed: {type(e).__name__}: {e}; build the engines again") from e
        if not same:
            raise CorruptError(f"{source}: sizes contradict each other; it was edited; build the engines again")
        return engines


def _check(engines: Engines) -> None:
    """What C++ readers rely on; a field of the wrong type is a TypeError or a ValueError."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+){2,3}", engines.tensorrt_version):
        raise ValueError(f"tensorrt_version: expected numbers such as 10.3.0, got {engines.tensorrt_version!r}")
    for p in engines.plans:
        if "/" in p.plan or p.plan.startswith("."):
            raise ValueError(f"plan: expected a file name, got {p.plan!r}")
        integers = (*engines.sm, p.tokens, p.nbytes, p.constant_bytes, engines.state_bytes, p.workspace_bytes or 0)
        if not all(type(x) is int and x >= 0 for x in integers):
            raise TypeError(f"{p.name}: expected whole numbers, got {integers}")


def _plan_json(p: PlanInfo) -> dict[str, Any]:
    plan = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    for field in ("inputs", "outputs"):
        plan[field] = [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "nbytes": t.nbytes} for t in plan[field]
        ]
    plan["weights"] = [{**dataclasses.asdict(w), "shape": list(w.shape)} for w in p.weights]
    return plan


def _plan_from(d: dict[str, Any]) -> PlanInfo:
    tensors = {
        field: tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in d[field])
        for field in ("inputs", "outputs")
    }
    weights = tuple(WeightInput(**{**w, "shape": tuple(w["shape"])}) for w in d["weights"])
    for w in weights:
        if math.prod(w.shape) * DTYPE_BYTES[w.dtype] != w.nbytes or w.offset < 0:
            raise ValueError(f"{w.name}: {w.nbytes} bytes at {w.offset} contradict shape {w.shape} of {w.dtype}")
    return PlanInfo(**{**d, **tensors, "weights": weights})
