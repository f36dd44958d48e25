"""A bundle's graphs as networks of this project's own kernels: one TensorRT plugin node for each part of the model.

TensorRT then only places tensors and calls the nodes. Every weight is a network input, so that all plans read one
device copy of model.onnx.data, no precision is TensorRT's to choose, and a build takes seconds. The kernels are in
runtime/csrc/trt/ops; `_Numbers` mirrors its op.h.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lococo_runtime._exceptions import UnsupportedError
from lococo_runtime.bundle import GraphSpec, Manifest, TensorSpec

from .metadata import WeightInput

PLUGIN = ("LococoOp", "1", "lococo")  # type, version, namespace
MAX_FUSION_LAYERS = 16  # of one node: its pointers travel as kernel arguments
MAX_CONV_LAYERS = 4
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int32": 3}
_ACTIVATIONS = ("none", "relu", "silu", "tanh", "gelu")
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class Op(enum.IntEnum):
    """What a node computes."""

    EMBED = 0
    LAYER = 1
    HEAD = 2
    LM_HEAD = 3
    FUSION = 4


@dataclass(frozen=True)
class _Numbers:
    """The integers that describe an op, in the plugin's order."""

    kind: Op
    dtype: int
    width: int
    hidden: int = 0
    intermediate: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    capacity: int = 0
    vocab_size: int = 0
    rope_digits: int = 0
    biases: int = 0
    qk_norm: int = 0
    scores: int = 0
    decay_per_token: int = 0
    num_layers: int = 0
    keep: int = 0
    mixed: int = 0
    local: int = 0
    kernel_size: int = 0
    activation: int = 0
    num_conv: int = 0
    conv_out: tuple[int, ...] = ()

    def flat(self) -> tuple[int, ...]:
        *numbers, conv_out = vars(self).values()
        return (*numbers, *conv_out, *[0] * (MAX_CONV_LAYERS - len(conv_out)))


@dataclass(frozen=True)
class Node:
    """One plugin node.

    Attributes:
        name: unique in its network.
        numbers: what it computes, in the order of op.h.
        eps, score_decay: of the norms, and of accumulated scores.
        inputs: names of tensors, of the graph, of weights, or of nodes before.
        outputs: the graph's, or `hidden.{i}` between nodes.
    """

    name: str
    numbers: tuple[int, ...]
    eps: float
    score_decay: float
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class KernelNetwork:
    """A graph made of nodes.

    Attributes:
        inputs, outputs: the graph's, without the weights.
        weights: the network's other inputs, in order of their offset.
        nodes: in the order they run.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightInput, ...]
    nodes: tuple[Node, ...]


def kernel_network(
    manifest: Manifest, spec: GraphSpec, weights: Mapping[str, WeightInput], num_layers: int | None = None
) -> KernelNetwork:
    """The nodes of graph `spec`.

    Args:
        manifest, spec: of the bundle; `require_shapes` accepts it.
        weights: every tensor of the weights file that the graph's ONNX reads, by name.
        num_layers: keep only the first so many layers, for debugging; None keeps all.
    """
    graph = _Graph(manifest, spec, weights, manifest.model.num_layers if num_layers is None else num_layers)
    build = {"decoder": graph.decoder, "fusion": graph.fusion, "lm_head": graph.lm_head}[spec.kind]
    nodes = tuple(build())
    read = {name for node in nodes for name in node.inputs}
    made = {t.name for node in nodes for t in node.outputs}
    return KernelNetwork(
        inputs=tuple(t for t in spec.inputs if t.name in read),
        outputs=tuple(t for t in spec.outputs if t.name in made),
        weights=tuple(sorted((w for n, w in weights.items() if n in read), key=lambda w: w.offset)),
        nodes=nodes,
    )


def require_shapes(manifest: Manifest) -> None:
    """Raises UnsupportedError where the kernels cannot run the model; says what to do instead.

    The limits are those of `unsupported` in runtime/csrc/trt/ops/op.cc, asked for before anything is loaded or built.
    """
    model, cache = manifest.model, manifest.cache
    pack = 4 if manifest.dtype == "float32" else 8  # values of 16 bytes
    lanes = model.head_dim / pack
    problems = [
        f"{name}: expected a multiple of {pack}, got {value}"
        for name, value in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size))
        if value % pack
    ]
    if lanes < 1 or not math.log2(lanes).is_integer() or lanes > 32:
        problems.append(f"head_dim: expected {pack} times a power of two, at most {32 * pack}, got {model.head_dim}")
    if cache.num_conv_layers > MAX_CONV_LAYERS:
        problems.append(f"num_conv_layers: expected at most {MAX_CONV_LAYERS}, got {cache.num_conv_layers}")
    if manifest.batch_size != 1:
        problems.append(f"batch_size: expected 1, got {manifest.batch_size}")
    if problems:
        raise UnsupportedError(f"the kernels: {'; '.join(problems)}; build with --kernels tensorrt")


class _Graph:
    """Writes the nodes of one graph."""

    def __init__(
        self, manifest: Manifest, spec: GraphSpec, weights: Mapping[str, WeightInput], num_layers: int
    ) -> None:
        self.model, self.cache, self.dtype = manifest.model, manifest.cache, manifest.dtype
        self.spec, self.weights, self.num_layers = spec, weights, num_layers
        self.specs = {t.name: t for t in spec.outputs}
        self.width = spec.tokens
        self.tied = "model.embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"

    def decoder(self) -> Iterator[Node]:
        m, w = self.model, self.width
        lengths = ["position_ids", "past_length", *(["num_tokens"] if w > 1 else [])]
        rope = [f"rope.{f}.{k}" for k in range(self._rope_digits) for f in ("cos", "sin")]
        x = self._hidden(0)
        yield self._node("embed", self._numbers(Op.EMBED), ["input_ids", "model.embed_tokens.weight"], [x])
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            linears = [f"{layer}.{name}" for name in _LINEARS]
            biases = [f"{name}.bias" for name in linears]
            numbers = self._numbers(
                Op.LAYER,
                intermediate=m.intermediate_size,
                num_heads=m.num_heads,
                num_kv_heads=m.num_kv_heads,
                head_dim=m.head_dim,
                capacity=self.cache.capacity,
                rope_digits=self._rope_digits,
                biases=sum(1 << j for j, name in enumerate(biases) if name in self.weights),
                qk_norm=int(m.qk_norm),
                scores=int(self.cache.score_decay > 0),
                decay_per_token=int(self.cache.decay_per == "token"),
            )
            inputs = [x.name, *lengths, f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
            inputs += [f"past_scores.{i}"] if self.cache.score_decay > 0 else []
            inputs += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
            inputs += [f"{name}.weight" for name in linears]
            inputs += [name for name in biases if name in self.weights]
            inputs += [f"{layer}.self_attn.{n}_norm.weight" for n in "qk"] if m.qk_norm else []
            x = self._hidden(i + 1)
            new = [f"new_key_values.{i}.key", f"new_key_values.{i}.value", f"scores.{i}"]
            yield self._node(f"layer.{i}", numbers, [*inputs, *rope], [x, *(self.specs[n] for n in new)])
        outputs = [self.specs["logits"], *([self.specs["hidden_states"]] if w > 1 else [])]
        inputs = [x.name, *(["num_tokens"] if w > 1 else []), "model.norm.weight", self.tied]
        yield self._node("head", self._numbers(Op.HEAD, vocab_size=m.vocab_size), inputs, outputs)

    def lm_head(self) -> Iterator[Node]:
        numbers = self._numbers(Op.LM_HEAD, vocab_size=self.model.vocab_size)
        yield self._node("lm_head", numbers, ["hidden_states", self.tied], [self.specs["logits"]])

    def fusion(self) -> Iterator[Node]:
        cache = self.cache
        convs = range(cache.num_conv_layers if cache.num_mixed else 0)
        lengths = ["past_length", "num_tokens"] if self.width > 1 else []
        for first in range(0, self.num_layers, MAX_FUSION_LAYERS):
            layers = range(first, min(first + MAX_FUSION_LAYERS, self.num_layers))
            numbers = self._numbers(
                Op.FUSION,
                num_kv_heads=self.model.num_kv_heads,
                head_dim=self.model.head_dim,
                capacity=cache.capacity,
                scores=int(cache.score_decay > 0),
                num_layers=len(layers),
                keep=cache.keep,
                mixed=cache.num_mixed,
                local=cache.local_len,
                kernel_size=cache.kernel_size,
                activation=_ACTIVATIONS.index(cache.activation),
                num_conv=len(convs),
                conv_out=tuple(self.weights[f"fusion.{first}.conv.{j}.weight"].shape[0] for j in convs),
            )
            inputs, outputs = [*lengths], []
            for i in layers:
                inputs += [f"{when}_key_values.{i}.{what}" for when in ("past", "new") for what in ("key", "value")]
                inputs += [f"scores.{i}", *([f"fusion.{i}.normalizer"] if cache.num_mixed else [])]
                inputs += [f"fusion.{i}.conv.{j}.{what}" for j in convs for what in ("weight", "bias")]
                outputs += [f"present.{i}.key", f"present.{i}.value"]
                outputs += [f"present_scores.{i}"] if cache.score_decay > 0 else []
            yield self._node(f"fusion.{first}", numbers, inputs, [self.specs[n] for n in outputs])

    @property
    def _rope_digits(self) -> int:
        return sum(name.startswith("rope.cos.") for name in self.weights)

    def _numbers(self, kind: Op, **more: int | tuple[int, ...]) -> _Numbers:
        hidden = self.model.hidden_size
        return _Numbers(kind, DTYPE_CODES[self.dtype], self.width, hidden=hidden, **more)  # type: ignore[arg-type]

    def _hidden(self, i: int) -> TensorSpec:
        return TensorSpec(f"hidden.{i}", (self.width, self.model.hidden_size), self.dtype)

    def _node(self, name: str, numbers: _Numbers, inputs: list[str], outputs: list[TensorSpec]) -> Node:
        return Node(
            name, numbers.flat(), self.model.rms_norm_eps, self.cache.score_decay, tuple(inputs), tuple(outputs)
        )
