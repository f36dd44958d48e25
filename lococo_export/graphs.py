"""The static graphs of a bundle: decoder (a forward of w tokens), fusion (what may follow it), lm_head.

Every tensor has a fixed shape. Which columns of the cache are live is data (`past_length`, `num_tokens`), turned into
masks inside. Letters of the shape comments: b batch, w tokens of the forward, c capacity = M + buffer, s = c + w
columns seen by a forward, h KV heads, g query heads per KV head, d head_dim, n rest columns, mc mixed slots.

Four model-local functions of domain "lococo" carry the parts that native kernels may replace: RMSNorm,
RotateHalf, SlotAttention and SlotFusion. Their bodies are standard operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from lococo_runtime.bundle import GraphSpec, LococoConfig, ModelGeometry

from .onnx_writer import DOMAIN, NodeList, WeightsFile, save_model
from .rope import DIGIT, rope_tables

MASKED = -1e30  # added to float32 attention logits of dead columns


class GraphWriter:
    """Writes the graphs of one model.

    Args:
        model, cache: what to write.
        dtype: of weights, activations and cache; norms, attention softmax, scores and logits are float32 throughout.
        weights: the file that `write_weights` filled.
    """

    def __init__(
        self, model: ModelGeometry, cache: LococoConfig, dtype: str, weights: WeightsFile, producer: str
    ) -> None:
        self.model, self.cache, self.dtype, self.batch = model, cache, dtype, 1
        self.weights, self.producer = weights, producer
        self.group = model.num_heads // model.num_kv_heads

    def write(self, spec: GraphSpec, directory: Path) -> None:
        """Writes the ONNX file of `spec` into `directory`."""
        self.batch = spec.batch
        build = {"decoder": self._decoder, "fusion": self._fusion, "lm_head": self._lm_head}[spec.kind]
        nodes, functions = build(spec.tokens)
        save_model(directory / spec.file, nodes, spec.inputs, spec.outputs, functions, self.weights, self.producer)

    # --- decoder -----------------------------------------------------------------------------------------------------

    def _decoder(self, w: int) -> tuple[NodeList, list[onnx.FunctionProto]]:
        m, b, d, t = self.model, self.batch, self.model.head_dim, NodeList()
        functions = [self._rms_norm(), self._rotary_embedding(), self._slot_attention(w)]

        cos, sin = self._rotary_angles(t, w)  # (b, 1, w, d/2) each, in the model's dtype
        mask = self._attention_mask(t, w)  # (b, 1, 1, w, s) float32, added to the logits
        rows = self._query_rows(t, w) if w > 1 else None  # (b, 1, 1, g*w) float32: what queries count for in scores

        x = t.op("Gather", "model.embed_tokens.weight", "input_ids")  # (b, w, hidden)
        x = t.reshape(x, b * w, m.hidden_size)
        received_scores = []
        for i in range(m.num_layers):
            t.scope = f"layers.{i}."
            layer = f"model.layers.{i}"
            y = self._norm(t, x, f"{layer}.input_layernorm.weight")
            q = self._heads(t, y, w, m.num_heads, f"{layer}.self_attn.q_proj", f"{layer}.self_attn.q_norm.weight")
            k = self._heads(t, y, w, m.num_kv_heads, f"{layer}.self_attn.k_proj", f"{layer}.self_attn.k_norm.weight")
            value = self._heads(t, y, w, m.num_kv_heads, f"{layer}.self_attn.v_proj", None, f"new_key_values.{i}.value")
            q = t.op("RotateHalf", q, cos, sin, domain=DOMAIN)  # (b, h*g, w, d)
            key = t.op("RotateHalf", k, cos, sin, domain=DOMAIN, output=f"new_key_values.{i}.key")
            past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
            inputs = [q, *past, key, value, mask, *([rows] if rows else [])]
            out, received = t.ops("SlotAttention", inputs, [None, None], domain=DOMAIN)  # (b, h*g, w, d), (b, h, 1, s)
            received_scores.append(received)
            if w > 1:
                out = t.op("Transpose", out, perm=[0, 2, 1, 3])
            out = t.reshape(out, b * w, m.num_heads * d)
            x = t.op("Add", x, self._linear(t, out, f"{layer}.self_attn.o_proj"))
            y = self._norm(t, x, f"{layer}.post_attention_layernorm.weight")
            gate = self._linear(t, y, f"{layer}.mlp.gate_proj")
            gate = t.op("Mul", gate, t.op("Sigmoid", gate))
            y = t.op("Mul", gate, self._linear(t, y, f"{layer}.mlp.up_proj"))
            x = t.op("Add", x, self._linear(t, y, f"{layer}.mlp.down_proj"))
        t.scope = ""
        x = self._norm(t, x, "model.norm.weight")  # (b*w, hidden)
        if w > 1:
            t.reshape(x, b, w, m.hidden_size, output="hidden_states")
            last = t.op("Add", "num_tokens", t.constant(np.arange(b) * w - 1, "int32"))  # (b)
            x = t.op("Gather", x, last)  # (b, hidden)
        t.cast(self._logits(t, x), "float32", output="logits")
        # Last, and the first layer's last of all: ONNX Runtime orders nodes from the last leaf backwards, and would
        # otherwise keep every layer's attention probabilities until the end, 150 MB for a block of SmolLM2.
        for i, received in reversed(list(enumerate(received_scores))):
            self._scores(t, received, i, w)
        return t, functions

    def _scores(self, t: NodeList, received: str, i: int, w: int) -> None:
        """scores.{i} (b, h, s) from what the columns received (b, h, 1, s) and, where scores accumulate, the past."""
        b, h, c, decay = self.batch, self.model.num_kv_heads, self.cache.capacity, self.cache.score_decay
        if decay == 0:
            t.reshape(received, b, h, c + w, output=f"scores.{i}")
            return
        if self.cache.decay_per == "token" and w > 1:
            count = t.cast(t.reshape("num_tokens", b, 1, 1), "float32")
            factor = t.op("Pow", t.constant(decay, "float32"), count)  # (b, 1, 1)
        else:
            factor = t.constant(decay, "float32")
        old = t.op("Mul", f"past_scores.{i}", factor)
        old = t.op("Concat", old, t.constant(np.zeros((b, h, w)), "float32"), axis=2)
        t.op("Add", t.reshape(received, b, h, c + w), old, output=f"scores.{i}")

    def _linear(self, t: NodeList, x: str, name: str, output: str | None = None) -> str:
        """(rows, in) -> (rows, out); the weight stays (out, in) as in the checkpoint, tied or not."""
        bias = [f"{name}.bias"] if f"{name}.bias" in self.weights else []
        return t.op("Gemm", x, f"{name}.weight", *bias, transB=1, output=output)

    def _logits(self, t: NodeList, x: str) -> str:
        name = "model.embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"
        return t.op("Gemm", x, name, transB=1)

    def _norm(self, t: NodeList, x: str, weight: str) -> str:
        return t.op("RMSNorm", x, weight, domain=DOMAIN)

    def _heads(
        self, t: NodeList, x: str, w: int, heads: int, name: str, norm: str | None, output: str | None = None
    ) -> str:
        """(b*w, hidden) -> (b, heads, w, d)"""
        x = self._linear(t, x, name)
        if w == 1:  # (b, 1, heads, d) and (b, heads, 1, d) are the same bytes
            x = t.reshape(x, self.batch, heads, 1, self.model.head_dim, output=None if norm else output)
        else:
            x = t.reshape(x, self.batch, w, heads, self.model.head_dim)
        if norm is not None and self.model.qk_norm:
            x = self._norm(t, x, norm)
        return x if w == 1 else t.op("Transpose", x, perm=[0, 2, 1, 3], output=output)

    def _rotary_angles(self, t: NodeList, w: int) -> tuple[str, str]:
        """cos and sin of position * frequency, from tables of the position's digits: exact at any position.

        A float32 product position * frequency is off by 0.06 rad at a million; exp(i*(x+y)) = exp(ix) * exp(iy) keeps
        the float64 accuracy with which each digit's table was made.
        """
        t.scope = "rope."
        base = t.constant(DIGIT, "int32")
        rest = t.reshape("position_ids", self.batch, 1)
        if w > 1:
            rest = t.op("Add", rest, t.constant(np.arange(w)[None], "int32"))  # (b, w)
        cos = sin = ""
        for k in range(self.num_digits):
            digit = rest
            if k < self.num_digits - 1:
                higher = t.op("Div", rest, base)
                digit = t.op("Sub", rest, t.op("Mul", higher, base))
                rest = higher
            c = t.op("Gather", f"rope.cos.{k}", digit)  # (b, w, d/2)
            s = t.op("Gather", f"rope.sin.{k}", digit)
            if k == 0:
                cos, sin = c, s
            else:
                cos, sin = (
                    t.op("Sub", t.op("Mul", cos, c), t.op("Mul", sin, s)),
                    t.op("Add", t.op("Mul", sin, c), t.op("Mul", cos, s)),
                )
        shape = (self.batch, 1, w, self.model.head_dim // 2)
        return tuple(self._to_model(t, t.reshape(x, *shape)) for x in (cos, sin))  # type: ignore[return-value]

    @property
    def num_digits(self) -> int:
        return sum(f"rope.cos.{k}" in self.weights for k in range(8))

    def _to_model(self, t: NodeList, x: str) -> str:
        """From float32 to the model's dtype."""
        return x if self.dtype == "float32" else t.cast(x, self.dtype)

    def _to_float32(self, t: NodeList, x: str) -> str:
        return x if self.dtype == "float32" else t.cast(x, "float32")

    def _attention_mask(self, t: NodeList, w: int) -> str:
        """(b, 1, 1, w, s): live state columns are seen by all, the new ones causally."""
        t.scope = "mask."
        b, c = self.batch, self.cache.capacity
        live = t.op("Less", t.constant(np.arange(c)[None], "int32"), t.reshape("past_length", b, 1))  # (b, c)
        past = t.op("Where", live, t.constant(0.0, "float32"), t.constant(MASKED, "float32"))
        past = t.op("Expand", t.reshape(past, b, 1, 1, 1, c), t.shape(b, 1, 1, w, c))
        query, token = np.arange(w)[:, None], np.arange(w)[None]
        seen = t.op("Less", t.constant(token, "int32"), t.constant(query + 1, "int32"))  # (w, w)
        new = t.op("Where", seen, t.constant(0.0, "float32"), t.constant(MASKED, "float32"))
        new = t.op("Expand", new, t.shape(b, 1, 1, w, w))
        return t.op("Concat", past, new, axis=-1)

    def _query_rows(self, t: NodeList, w: int) -> str:
        """(b, 1, 1, g*w): what queries count for in the scores: 1, or less by their age; 0 for padding."""
        t.scope = "rows."
        count, token = t.reshape("num_tokens", self.batch, 1), t.constant(np.arange(w)[None], "int32")
        rows = t.cast(t.op("Less", token, count), "float32")  # (b, w)
        if self.cache.decay_per == "token":
            age = t.op("Sub", t.op("Sub", count, t.constant(1, "int32")), token)
            age = t.op("Max", t.cast(age, "float32"), t.constant(0.0, "float32"))  # of padding it is not used
            rows = t.op("Mul", rows, t.op("Pow", t.constant(self.cache.score_decay, "float32"), age))
        rows = t.reshape(rows, self.batch, 1, 1, w)
        return t.op("Concat", *[rows] * self.group, axis=-1) if self.group > 1 else rows

    # --- lm_head -----------------------------------------------------------------------------------------------------

    def _lm_head(self, w: int) -> tuple[NodeList, list[onnx.FunctionProto]]:
        t = NodeList()
        x = t.reshape("hidden_states", self.batch * w, self.model.hidden_size)
        logits = self._to_float32(t, self._logits(t, x))
        t.reshape(logits, self.batch, w, self.model.vocab_size, output="logits")
        return t, []

    # --- fusion ------------------------------------------------------------------------------------------------------

    def _fusion(self, w: int) -> tuple[NodeList, list[onnx.FunctionProto]]:
        cache, b, c, t = self.cache, self.batch, self.cache.capacity, NodeList()
        s, local = c + w, self.cache.local_len
        # Columns stand in cache order already: live state columns, a gap, new columns, a gap. After a single-token step
        # there is no gap, and all three tensors are constants.
        order = s - np.arange(s)  # falls along the cache, so that TopK by it sorts ascending
        if w == 1:
            rest_order = t.constant(order[None, None], "float32")
            candidate = t.constant((np.arange(s) < s - local)[None, None], "bool")
            recent = t.constant(np.broadcast_to(np.arange(s - local, s), (b, 1, local)), "int64") if local else ""
        else:
            length, count = t.reshape("past_length", b, 1), t.reshape("num_tokens", b, 1)
            column = np.arange(s)[None]
            past_live = t.op("Less", t.constant(np.where(column < c, column, s), "int32"), length)  # (b, s)
            new_live = t.op("Less", t.constant(np.where(column < c, s, column - c), "int32"), count)
            live = t.op("Or", past_live, new_live)
            rest_order = t.op("Where", live, t.constant(order[None], "float32"), t.constant(0.0, "float32"))
            rest_order = t.reshape(rest_order, b, 1, s)
            # rank: the position in cache order, i for state columns and past_length + i - c for new ones
            rank = t.op("Add", t.constant(np.where(column < c, column, column - c), "int32"),
                        t.op("Mul", length, t.constant((column >= c).astype("int32"), "int32")))  # fmt: skip
            total = t.op("Add", length, count)
            older = t.op("Less", rank, t.op("Sub", total, t.constant(local, "int32")))
            candidate = t.reshape(t.op("And", live, older), b, 1, s)
            recent = ""
            if local:
                back = t.op("Add", t.op("Sub", total, t.constant(local, "int32")),
                            t.constant(np.arange(local)[None], "int32"))  # fmt: skip
                gap = t.op("Sub", t.constant(c, "int32"), length)  # a new token's column is its rank + gap
                recent = t.op("Where", t.op("Less", back, length), back, t.op("Add", back, gap))  # (b, local)
                recent = t.reshape(t.cast(recent, "int64"), b, 1, local)
        shared = [rest_order, candidate, *([recent] if local else [])]
        for i in range(self.model.num_layers):
            layer = f"fusion.{i}"
            heads = []
            if cache.num_mixed:
                heads = [f"{layer}.normalizer"]
                for j in range(cache.num_conv_layers):
                    heads += [f"{layer}.conv.{j}.weight", f"{layer}.conv.{j}.bias"]
            past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
            new = [f"new_key_values.{i}.key", f"new_key_values.{i}.value"]
            outputs = [f"present.{i}.key", f"present.{i}.value"]
            outputs += [f"present_scores.{i}"] if cache.score_decay > 0 else []
            t.ops("SlotFusion", [*past, *new, f"scores.{i}", *shared, *heads], outputs, domain=DOMAIN)
        return t, [self._slot_fusion(w)]

    def _slot_fusion(self, w: int) -> onnx.FunctionProto:
        """`compress` of one layer: kept slots verbatim, the rest mixed into mc slots (arXiv 2406.05317)."""
        cache, b, h, t = self.cache, self.batch, self.model.num_kv_heads, NodeList()
        c, mc, keep, local, d = cache.capacity, cache.num_mixed, cache.keep, cache.local_len, self.model.head_dim
        s = c + w
        n = s - keep
        padded = w > 1  # the rest has fewer than n live slots
        inputs = ["past_key", "past_value", "new_key", "new_value", "scores", "rest_order", "candidate"]
        inputs += ["recent"] if local else []
        outputs = ["key", "value"] + (["out_scores"] if cache.score_decay > 0 else [])

        rows = t.op("Concat", t.op("Concat", "past_key", "new_key", axis=2),
                    t.op("Concat", "past_value", "new_value", axis=2), axis=3)  # (b, h, s, 2d)  # fmt: skip
        rows = t.reshape(rows, b * h * s, 2 * d)
        parts, score_parts = [], []

        keep_index = self._kept_columns(t) if keep else ""  # (b, h, keep)
        if keep:
            parts.append(self._take(t, rows, keep_index, s, keep))  # (b, h, keep, 2d)
            score_parts.append(t.op("GatherElements", "scores", keep_index, axis=2))
        if mc:
            inputs += ["normalizer"]
            remaining = "rest_order"  # (b, 1, s), 0 for dead columns
            if keep:
                zeros = t.constant(np.zeros((b, h, s)), "float32")
                kept = t.op("ScatterElements", zeros, keep_index, t.constant(np.ones((b, h, keep)), "float32"), axis=2)
                remaining = t.op("Mul", remaining, t.op("Sub", t.constant(1.0, "float32"), kept))
            else:
                remaining = t.op("Expand", remaining, t.shape(b, h, s))
            order, rest_index = t.ops("TopK", [remaining, t.shape(n)], [None, None], axis=2)  # (b, h, n), ascending
            rest = t.reshape(self._take(t, rows, rest_index, s, n), b * h, n, 2 * d)
            rest_scores = t.op("GatherElements", "scores", rest_index, axis=2)  # (b, h, n)
            live = t.op("Greater", order, t.constant(0.0, "float32")) if padded else ""
            ranked = t.op("Where", live, rest_scores, t.constant(-1.0, "float32")) if padded else rest_scores
            _, anchor = t.ops("TopK", [ranked, t.shape(mc)], [None, None], axis=2)
            anchor = self._ascending(t, anchor, mc)  # (b, h, mc), index into the rest
            anchors = self._take(t, t.reshape(rest, b * h * n, 2 * d), anchor, n, mc)  # (b, h, mc, 2d)

            live_row = t.reshape(live, b * h, 1, n) if padded else ""
            live_factor = self._to_model(t, t.cast(live_row, "float32")) if padded else ""
            x = t.op("Transpose", rest, perm=[0, 2, 1])  # (b*h, 2d, n), keys first
            for j in range(cache.num_conv_layers):
                inputs += [f"weight_{j}", f"bias_{j}"]
                if padded:  # zeros beyond the last live slot are the convolution's own padding, at every layer
                    x = t.op("Mul", x, live_factor)
                half = cache.kernel_size // 2
                x = t.op("Conv", x, f"weight_{j}", f"bias_{j}", kernel_shape=[cache.kernel_size], pads=[half, half])
                x = self._activation(t, x)
            if padded:
                lowest = t.constant(-65504.0 if self.dtype == "float16" else MASKED, self.dtype)
                x = t.op("Where", live_row, x, lowest)
            mix = t.op("Softmax", x, axis=-1)  # (b*h, mc, n)
            fused = t.reshape(t.op("MatMul", mix, rest), b, h, mc, 2 * d)
            one = t.constant(1.0, self.dtype)
            share = t.op("Sub", one, "normalizer")
            fused = t.op("Add", t.op("Mul", anchors, share), t.op("Mul", fused, "normalizer"))
            parts.append(fused)
            if cache.score_decay > 0:
                column = t.reshape(rest_scores, b * h, n, 1)
                mixed = t.reshape(t.op("MatMul", self._to_float32(t, mix), column), b, h, mc)
                anchored = t.op("GatherElements", rest_scores, anchor, axis=2)
                share, normalizer = self._to_float32(t, share), self._to_float32(t, "normalizer")
                score_parts.append(t.op("Add", t.op("Mul", anchored, share), t.op("Mul", mixed, normalizer)))
        if cache.buffer:
            parts.append(t.constant(np.zeros((b, h, cache.buffer, 2 * d)), self.dtype))
            score_parts.append(t.constant(np.zeros((b, h, cache.buffer)), "float32"))
        slots = t.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]  # (b, h, c, 2d)
        t.ops("Split", [slots, t.shape(d, d)], ["key", "value"], axis=3)
        if cache.score_decay > 0:
            t.op("Concat", *score_parts, axis=2, output="out_scores")
        doc = f"{s} columns to {cache.mem_size} slots: {keep} kept ({local} of them recent), {mc} mixed"
        return t.function("SlotFusion", inputs, outputs, doc)

    def _kept_columns(self, t: NodeList) -> str:
        """(b, h, keep) int64, ascending: the heavy hitters among the candidates, and the recent columns."""
        b, h, local = self.batch, self.model.num_kv_heads, self.cache.local_len
        heavy = self.cache.keep - local
        chosen = []
        if heavy:
            ranked = t.op("Where", "candidate", "scores", t.constant(-1.0, "float32"))  # scores are never negative
            _, index = t.ops("TopK", [ranked, t.shape(heavy)], [None, None], axis=2)
            chosen.append(index)
        if local:
            chosen.append(t.op("Expand", "recent", t.shape(b, h, local)))
        both = t.op("Concat", *chosen, axis=2) if len(chosen) == 2 else chosen[0]
        return self._ascending(t, both, self.cache.keep)

    def _ascending(self, t: NodeList, index: str, count: int) -> str:
        """Sorts indices along the last axis. By way of float32, which TopK takes everywhere and which is exact here."""
        values, _ = t.ops("TopK", [t.cast(index, "float32"), t.shape(count)], [None, None], axis=2, largest=0)
        return t.cast(values, "int64")

    def _take(self, t: NodeList, rows: str, index: str, stride: int, count: int) -> str:
        """rows (b*h*stride, 2d), index (b, h, count) within each head's stride rows -> (b, h, count, 2d)"""
        b, h = self.batch, self.model.num_kv_heads
        first = (np.arange(b * h) * stride).reshape(b, h, 1)
        return t.op("Gather", rows, t.op("Add", index, t.constant(first, "int64")))

    def _activation(self, t: NodeList, x: str) -> str:
        match self.cache.activation:
            case "none":
                return x
            case "relu":
                return t.op("Relu", x)
            case "silu":
                return t.op("Mul", x, t.op("Sigmoid", x))
            case "tanh":
                return t.op("Tanh", x)
            case "gelu":
                erf = t.op("Erf", t.op("Mul", x, t.constant(math.sqrt(0.5), self.dtype)))
                half = t.op("Mul", x, t.constant(0.5, self.dtype))
                return t.op("Mul", half, t.op("Add", erf, t.constant(1.0, self.dtype)))
        raise AssertionError(self.cache.activation)  # LococoConfig knows no other

    # --- functions ---------------------------------------------------------------------------------------------------

    def _rms_norm(self) -> onnx.FunctionProto:
        """x * weight / sqrt(mean(x^2) + eps), computed in float32 (arXiv 1910.07467)."""
        t = NodeList()
        x = self._to_float32(t, "x")
        mean = t.op("ReduceMean", t.op("Pow", x, t.constant(2.0, "float32")), axes=[-1], keepdims=1)
        root = t.op("Sqrt", t.op("Add", mean, t.constant(self.model.rms_norm_eps, "float32")))
        y = self._to_model(t, t.op("Div", x, root))
        t.op("Mul", y, "weight", output="y")
        return t.function("RMSNorm", ["x", "weight"], ["y"], "root mean square normalization over the last axis")

    def _rotary_embedding(self) -> onnx.FunctionProto:
        """Half-split rotation (arXiv 2104.09864): x (b, heads, w, d), cos and sin (b, 1, w, d/2)."""
        t, half = NodeList(), self.model.head_dim // 2
        low, high = t.ops("Split", ["x", t.shape(half, half)], [None, None], axis=-1)
        first = t.op("Sub", t.op("Mul", low, "cos"), t.op("Mul", high, "sin"))
        second = t.op("Add", t.op("Mul", high, "cos"), t.op("Mul", low, "sin"))
        t.op("Concat", first, second, axis=-1, output="y")
        return t.function("RotateHalf", ["x", "cos", "sin"], ["y"], "half-split rotary position embedding")

    def _slot_attention(self, w: int) -> onnx.FunctionProto:
        """Attention over the state's columns and the new ones, and the score that every column collects.

        query (b, h*g, w, d), past_* (b, h, c, d), new_* (b, h, w, d), mask (b, 1, 1, w, s), rows (b, 1, 1, g*w)
        -> out (b, h*g, w, d), received (b, h, 1, s) float32: probabilities summed over real queries and the group.
        """
        t, b, h, g, d = NodeList(), self.batch, self.model.num_kv_heads, self.group, self.model.head_dim
        c = self.cache.capacity
        inputs = ["query", "past_key", "past_value", "new_key", "new_value", "mask", *(["rows"] if w > 1 else [])]
        q = t.op("Mul", "query", t.constant(1.0 / math.sqrt(d), self.dtype))
        q = t.reshape(q, b, h, g * w, d)
        past = t.op("MatMul", q, t.op("Transpose", "past_key", perm=[0, 1, 3, 2]))  # (b, h, g*w, c)
        new = t.op("MatMul", q, t.op("Transpose", "new_key", perm=[0, 1, 3, 2]))  # (b, h, g*w, w)
        logits = self._to_float32(t, t.op("Concat", past, new, axis=-1))
        logits = t.op("Add", t.reshape(logits, b, h, g, w, c + w), "mask")
        p = t.reshape(t.op("Softmax", logits, axis=-1), b, h, g * w, c + w)
        if w > 1:
            t.op("MatMul", "rows", p, output="received")
        else:
            t.op("ReduceSum", p, t.shape(2), keepdims=1, output="received")
        p_past, p_new = t.ops("Split", [self._to_model(t, p), t.shape(c, w)], [None, None], axis=-1)
        out = t.op("Add", t.op("MatMul", p_past, "past_value"), t.op("MatMul", p_new, "new_value"))
        t.reshape(out, b, h * g, w, d, output="out")
        return t.function("SlotAttention", inputs, ["out", "received"], "attention over cache slots and new tokens")


def write_weights(
    weights: WeightsFile,
    model: ModelGeometry,
    tensors: Mapping[str, torch.Tensor],
    fusion_heads: Mapping[str, torch.Tensor],
    dtype: str,
) -> None:
    """Streams every tensor the graphs read: the decoder's under its own name, `fusion.{layer}....`, RoPE tables."""
    for name in tensors:
        weights.add(name, tensors[name], dtype)
    for name, tensor in fusion_heads.items():
        weights.add(name, tensor, dtype)
    for k, (cos, sin) in enumerate(rope_tables(model.rope, model.head_dim)):
        weights.add(f"rope.cos.{k}", torch.from_numpy(cos), "float32")
        weights.add(f"rope.sin.{k}", torch.from_numpy(sin), "float32")
