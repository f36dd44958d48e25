"""A bundle's ONNX graph as TensorRT is to see it: functions inlined, weights as inputs, optionally fewer layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from lococo_runtime._exceptions import CorruptError, InvalidArgumentError, UnsupportedError
from lococo_runtime.bundle import WEIGHTS_NAME, GraphSpec, TensorSpec
from onnx import TensorProto, helper, inliner

from .metadata import WeightInput

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
}
WEIGHT_ALIGNMENT = 256  # what TensorRT asks of device addresses

# the layer in a tensor's name: past_key_values.3.key, scores.3
_LAYER = re.compile(r"(?:past_key_values|new_key_values|present|scores|past_scores|present_scores)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class PreparedGraph:
    """A graph to parse.

    Attributes:
        model: serialized ONNX without functions; what it still reads from model.onnx.data is a constant of the plan.
        inputs, outputs: its tensors without the weights.
        weights: weights that became inputs, in order of their offset.
        constant_bytes: weights that stayed constants.
    """

    model: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightInput, ...]
    constant_bytes: int


def prepare_graph(
    path: Path, spec: GraphSpec, *, weights: str = "shared", num_layers: int | None = None
) -> PreparedGraph:
    """Reads the graph `spec` from `path`; the weights file is not opened.

    Args:
        path: the ONNX file.
        spec: from the manifest.
        weights: "shared" makes the matrices of decoder and lm_head graphs network inputs, so that all plans read one
            device copy. Vectors (norms, biases: under 0.1% of the bytes), RoPE tables and fusion heads stay constants,
            which TensorRT folds and lays out as it likes. "embedded" leaves everything a constant.
        num_layers: keep only the first so many layers, for debugging; None keeps all.

    Raises:
        CorruptError: not an ONNX file of this project.
        InvalidArgumentError: more layers asked for than there are.
    """
    model = _load(path)
    if num_layers is not None:
        _keep_layers(model.graph, spec, num_layers)
    model = inliner.inline_local_functions(model)
    shared = spec.kind in ("decoder", "lm_head") and weights == "shared"
    inputs: list[TensorProto] = []
    constants: list[TensorProto] = []
    for tensor in model.graph.initializer:
        movable = shared and len(tensor.dims) == 2 and not tensor.name.startswith("rope.")
        (inputs if movable else constants).append(tensor)
    own_inputs = [t.name for t in model.graph.input]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in inputs)
    return PreparedGraph(
        model=model.SerializeToString(deterministic=True),
        inputs=_kept(spec.inputs, own_inputs),
        outputs=_kept(spec.outputs, (t.name for t in model.graph.output)),
        weights=tuple(sorted((_weight_input(t, path) for t in inputs), key=lambda w: w.offset)),
        constant_bytes=sum(_external(t)["length"] for t in constants if t.data_location == TensorProto.EXTERNAL),
    )


def weight_inputs(path: Path) -> tuple[WeightInput, ...]:
    """Every tensor of the weights file that the graph at `path` reads. Raises CorruptError, UnsupportedError."""
    return tuple(_weight_input(t, path) for t in _load(path).graph.initializer)


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as e:
        raise CorruptError(f"{path}: not an ONNX file: {e}; export the bundle again") from e


def _kept(specs: tuple[TensorSpec, ...], names: Iterable[str]) -> tuple[TensorSpec, ...]:
    """Those of `specs` that are left."""
    left = set(names)
    return tuple(s for s in specs if s.name in left)


def _external(tensor: TensorProto) -> dict[str, int]:
    """offset and length of an external tensor."""
    return {e.key: int(e.value) for e in tensor.external_data if e.key in ("offset", "length")}


def _weight_input(tensor: TensorProto, path: Path) -> WeightInput:
    place = _external(tensor)
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    if location != WEIGHTS_NAME or set(place) != {"offset", "length"}:
        raise CorruptError(f"{path}: {tensor.name}: expected a weight in {WEIGHTS_NAME}, got one in {location!r}")
    if place["offset"] % WEIGHT_ALIGNMENT:
        raise UnsupportedError(
            f"{path}: {tensor.name}: expected an offset that is a multiple of {WEIGHT_ALIGNMENT}, got"
            f" {place['offset']}; export the bundle again, or build with --weights embedded"
        )
    return WeightInput(tensor.name, tuple(tensor.dims), DTYPES[tensor.data_type], place["offset"], place["length"])


def _keep_layers(graph: onnx.GraphProto, spec: GraphSpec, num_layers: int) -> None:
    """Removes the layers from num_layers on, and everything only they need."""
    layers = {int(m[1]) for t in spec.outputs if (m := _LAYER.match(t.name))}
    if not layers:  # lm_head
        return
    if not 1 <= num_layers <= len(layers):
        raise InvalidArgumentError(f"num_layers: expected 1 to {len(layers)}, got {num_layers}")

    def beyond(name: str) -> bool:
        match = _LAYER.match(name)
        return match is not None and int(match[1]) >= num_layers

    if spec.kind == "decoder" and num_layers < len(layers):
        by_weight = {n.input[1]: n for n in graph.node if n.op_type == "RMSNorm"}
        cut = by_weight[f"model.layers.{num_layers}.input_layernorm.weight"].input[0]  # (batch * tokens, hidden)
        by_weight["model.norm.weight"].input[0] = cut
    outputs = [t for t in graph.output if not beyond(t.name)]
    inputs = [t for t in graph.input if not beyond(t.name)]
    needed, nodes = {t.name for t in outputs}, []
    for node in reversed(graph.node):  # in topological order
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [t for t in graph.initializer if t.name in needed]
    for field, kept in (("output", outputs), ("input", inputs), ("node", nodes[::-1]), ("initializer", initializers)):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(kept)
