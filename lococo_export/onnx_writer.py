"""A small layer over onnx.helper: nodes by name, constants, and one weights file that many graphs refer to.

The graphs are written node by node, not traced: opset 17 for every TensorRT from 8.6 on, names that people recognise,
and weights streamed to disk one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from lococo_runtime import CheckpointError
from lococo_runtime.bundle import TensorSpec
from onnx import TensorProto, helper, numpy_helper

OPSET = 17  # the newest that TensorRT 8.6 reads
IR_VERSION = 8  # the first with model-local functions
DOMAIN = "lococo"
ALIGNMENT = 4096  # a page: weights can be mapped

ONNX_DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class WeightsFile:
    """Writes tensors to one file, each once, and hands out references to them.

    Raises:
        CheckpointError: a finite weight that overflows the chosen dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._references: dict[str, TensorProto] = {}
        self._file = path.open("wb")

    def add(self, name: str, tensor: torch.Tensor, dtype: str) -> None:
        """Appends `tensor`, converted to `dtype`, page-aligned."""
        converted = tensor.detach().to(TORCH_DTYPES[dtype]).contiguous()
        if not bool(torch.isfinite(converted).all()):
            largest = float(tensor.abs().max())
            raise CheckpointError(
                f"{name}: values up to {largest:g} overflow {dtype}; export with --bf16 or --dtype fp32"
            )
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        raw = converted.view(-1).view(torch.uint8).numpy()
        self._file.write(raw.data)
        reference = TensorProto(name=name, data_type=ONNX_DTYPES[dtype], dims=list(converted.shape))
        reference.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", str(offset)), ("length", str(raw.nbytes))):
            reference.external_data.add(key=key, value=value)
        self._references[name] = reference

    def reference(self, name: str) -> TensorProto:
        return self._references[name]

    def __contains__(self, name: str) -> bool:
        return name in self._references

    def close(self) -> None:
        self._file.close()


class NodeList:
    """Nodes under construction, of a graph or of a function body. Every value gets a readable, unique name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._counts: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.scope = ""

    def _unique(self, stem: str) -> str:
        stem = f"{self.scope}{stem}"
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        return stem if count == 0 else f"{stem}_{count}"

    def op(self, op_type: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Appends a node with one output and returns the output's name."""
        return self.ops(op_type, inputs, [output], domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str | None], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Appends a node with several outputs; None stands for a name of ours."""
        names = [o or self._unique(op_type) for o in outputs]
        node = helper.make_node(op_type, list(inputs), names, name=f"{names[0]}:{op_type}", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def constant(self, value: Any, dtype: str) -> str:
        """A small constant in the graph itself; equal ones are shared."""
        array = np.asarray(value, dtype="float32" if dtype == "bfloat16" else dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = numpy_helper.from_array(array)
            if dtype == "bfloat16":
                tensor = helper.make_tensor("", TensorProto.BFLOAT16, array.shape, array.flatten().tolist())
            scope, self.scope = self.scope, ""
            self._constants[key] = self.op("Constant", value=tensor)
            self.scope = scope
        return self._constants[key]

    def shape(self, *dims: int) -> str:
        return self.constant(list(dims), "int64")

    def reshape(self, x: str, *dims: int, output: str | None = None) -> str:
        return self.op("Reshape", x, self.shape(*dims), output=output)

    def cast(self, x: str, dtype: str, output: str | None = None) -> str:
        return self.op("Cast", x, to=ONNX_DTYPES[dtype], output=output)

    def function(self, name: str, inputs: Sequence[str], outputs: Sequence[str], doc: str) -> onnx.FunctionProto:
        """These nodes as a model-local function."""
        return helper.make_function(
            DOMAIN, name, list(inputs), list(outputs), self.nodes, [helper.make_opsetid("", OPSET)], doc_string=doc
        )


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, ONNX_DTYPES[spec.dtype], list(spec.shape))


def save_model(
    path: Path,
    nodes: NodeList,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    functions: Sequence[onnx.FunctionProto],
    weights: WeightsFile,
    producer: str,
) -> None:
    """Writes a model beside its weights file; only the weights that its nodes read become initializers."""
    used = dict.fromkeys(name for node in nodes.nodes for name in node.input if name in weights)
    graph = helper.make_graph(
        nodes.nodes,
        path.stem,
        [value_info(s) for s in inputs],
        [value_info(s) for s in outputs],
        [weights.reference(name) for name in used],
    )
    model = helper.make_model(
        graph,
        functions=list(functions),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name=producer,
    )
    path.write_bytes(model.SerializeToString(deterministic=True))
