"""The decoder in PyTorch, with its slot cache as explicit static state: what every bundle is checked against.

A forward reads tokens beside a cache of C = M + buffer slots, of which the first `length` are live; an update then
appends the new columns, or fuses everything down to M slots when more than C would be live (arXiv 2406.05317). Shapes
never depend on lengths: columns are masked. Names in shapes:

    B batch, n tokens of a forward, S = C + n columns, H query heads, K key-value heads, d head_dim, V vocabulary,
    M slots after a fusion, mc of them mixed, R = S - keep columns that were not kept
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lococo_runtime._exceptions import InvalidArgumentError
from lococo_runtime.bundle import LococoConfig, ModelGeometry
from torch import Tensor, nn

from .checkpoints import Checkpoint, HeadWeights
from .rope import inverse_frequencies

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


class FusionHead(Protocol):
    """What a fusion reads of a head: `HeadWeights`, or one that is being trained."""

    @property
    def normalizer(self) -> float | Tensor: ...  # a tensor is ()

    @property
    def convs(self) -> Sequence[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class LococoState:
    """All that is remembered between forwards. Never changed in place: an update makes a new one."""

    keys: list[Tensor]  # per layer (B, K, C, d), model dtype, after RoPE; zero from `length` on
    values: list[Tensor]  # per layer (B, K, C, d)
    scores: list[Tensor]  # per layer (B, K, C) float32; no entry unless score_decay > 0
    length: Tensor  # (B,) int64, live slots
    position: Tensor  # (B,) int64, tokens read
    logits: Tensor  # (B, V) float32, after the last token; zero before the first


@dataclass(frozen=True)
class ForwardResult:
    """What a forward computes; the state is not touched."""

    logits: Tensor  # (B, n, V) float32, or (B, 1, V) of the last valid token
    hidden_states: Tensor  # (B, n, hidden), after the final norm
    new_keys: list[Tensor]  # per layer (B, K, n, d)
    new_values: list[Tensor]  # per layer (B, K, n, d)
    scores: list[Tensor]  # per layer (B, K, S) float32: the C state columns, then the new ones


@dataclass(frozen=True)
class Selection:
    """Which columns a fusion keeps, mixes, and anchors on."""

    keep: Tensor  # (B, K, keep) int64, columns kept verbatim, ascending
    rest: Tensor  # (B, K, R) int64, the other columns, ascending; entries from `rest_length` on are dead columns
    residual: Tensor  # (B, K, mc) int64, a_i: index into `rest` of the anchor of each mixed slot, ascending
    rest_length: Tensor  # (B,) int64, N


@dataclass(frozen=True)
class FusedSlots:
    """The outcome of a fusion of one layer."""

    key: Tensor  # (B, K, M, d)
    value: Tensor  # (B, K, M, d)
    scores: Tensor  # (B, K, M) float32, carried over; meaningful only if score_decay > 0
    selection: Selection
    mixing: Tensor  # (B, K, mc, R), softmax weights over the rest, before the anchor is blended in


@dataclass(frozen=True)
class FusionEvent:
    """One layer of one fusion, for observers. Columns are in cache order, zero from `length` on."""

    layer: int
    fired: Tensor  # (B,) bool: rows of the batch that fuse now
    length: Tensor  # (B,) int64: live columns before
    key: Tensor  # (B, K, S, d) before
    value: Tensor  # (B, K, S, d) before
    scores: Tensor  # (B, K, S) float32, what the selection went by
    fused: FusedSlots


FusionObserver = Callable[[FusionEvent], None]


# --- the fusion -------------------------------------------------------------------------------------------------------


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (B, K, m) of `x` (B, K, S) or (B, K, S, d)."""
    return x.gather(2, index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices (B, K, count) of the largest scores, ascending; of equal scores the first ones, as in ONNX."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def select(scores: Tensor, length: Tensor, cache: LococoConfig, keep: Tensor | None = None) -> Selection:
    """Chooses heavy hitters, recent columns, and the anchors among the rest.

    Args:
        scores: (B, K, S) float32.
        length: (B,) int64, live columns; the first `length` are live, and there are more than M of them.
        cache: what to keep.
        keep: (B, K, keep) int64 ascending, if someone else has chosen what to keep.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)  # (S,)
    end = length[:, None, None]  # (B, 1, 1)
    if keep is None:
        heavy = _top(scores.masked_fill(column >= end - cache.local_len, -torch.inf), cache.keep - cache.local_len)
        recent = (end - cache.local_len + torch.arange(cache.local_len, device=scores.device)).clamp(min=0)
        keep = torch.cat([heavy, recent.expand(*scores.shape[:2], -1)], dim=-1)  # ascending: recent columns come last
    # columns that are kept or dead sort behind all others, and the rest stays in cache order
    behind = (column >= end).expand(scores.shape).scatter(2, keep, True)
    rest = torch.where(behind, column + scores.shape[-1], column).sort(dim=-1).indices[..., : -cache.keep or None]
    rest_length = length - cache.keep
    dead = torch.arange(rest.shape[-1], device=scores.device) >= rest_length[:, None, None]
    residual = _top(take_columns(scores, rest).masked_fill(dead, -torch.inf), cache.num_mixed)
    return Selection(keep, rest, residual, rest_length)


def mixing_logits(
    key_rest: Tensor, value_rest: Tensor, rest_length: Tensor, head: FusionHead, activation: str
) -> Tensor:
    """The convolutions over the rest: (B, K, mc, R), before the softmax (arXiv 2406.05317).

    Args:
        key_rest, value_rest: (B, K, R, d), zero from `rest_length` on.
        rest_length: (B,) int64, N.
        head: the layer's convolutions.
        activation: follows every convolution, the last one too.
    """
    batch, heads, rest, _ = key_rest.shape
    live = (torch.arange(rest, device=key_rest.device) < rest_length[:, None]).repeat_interleave(heads, 0)[:, None]
    x = torch.cat([key_rest, value_rest], dim=-1).reshape(batch * heads, rest, -1).transpose(1, 2)  # (B*K, 2d, R)
    for weight, bias in head.convs:
        # a bias makes dead columns non-zero; zeroed again, they equal the convolution's own padding
        x = _ACTIVATIONS[activation](F.conv1d(x * live, weight, bias, padding=weight.shape[-1] // 2))
    return x.reshape(batch, heads, -1, rest)


def fuse_slots(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    length: Tensor,
    cache: LococoConfig,
    head: FusionHead | None,
    chosen: Selection | None = None,
) -> FusedSlots:
    """Fuses the live columns of one layer into M slots: the kept ones verbatim, then the mixed ones.

    Mixed slot i is (1 - n) * rest[a_i] + n * softmax_i @ rest, with the same weights for keys, values and scores.

    Args:
        key, value: (B, K, S, d), zero from `length` on.
        scores: (B, K, S) float32.
        length: (B,) int64, more than M.
        head: needed for policy "lococo", unused for "h2o".
        chosen: what to keep, mix and anchor on; by the scores if None.
    """
    chosen = chosen or select(scores, length, cache)
    kept = [take_columns(x, chosen.keep) for x in (key, value, scores)]
    if head is None:
        none = key.new_zeros(*chosen.residual.shape, chosen.rest.shape[-1])
        return FusedSlots(kept[0], kept[1], kept[2], chosen, none)
    dead = torch.arange(chosen.rest.shape[-1], device=key.device) >= chosen.rest_length[:, None, None]  # (B, 1, R)
    rest = [
        take_columns(key, chosen.rest).masked_fill(dead[..., None], 0),
        take_columns(value, chosen.rest).masked_fill(dead[..., None], 0),
        take_columns(scores, chosen.rest).masked_fill(dead, 0),
    ]
    z = mixing_logits(rest[0], rest[1], chosen.rest_length, head, cache.activation)
    mixing = z.masked_fill(dead[:, :, None], -torch.inf).softmax(dim=-1)  # (B, K, mc, R)
    n = head.normalizer
    averages = [mixing @ rest[0], mixing @ rest[1], (mixing.float() @ rest[2][..., None]).squeeze(-1)]
    mixed = [(1 - n) * take_columns(r, chosen.residual) + n * a for r, a in zip(rest, averages, strict=True)]
    key, value, scores = (torch.cat([k, m], dim=2) for k, m in zip(kept, mixed, strict=True))
    return FusedSlots(key, value, scores, chosen, mixing)


def join_columns(past: Tensor, new: Tensor, length: Tensor, num_tokens: Tensor) -> Tensor:
    """Live columns of `past` (B, K, C, ...), then valid ones of `new` (B, K, n, ...), then zeros: (B, K, S, ...)."""
    both = torch.cat([past, new], dim=2)
    column = torch.arange(both.shape[2], device=both.device)  # (S,)
    start = length[:, None]
    index = torch.where(column < start, column, (column - start + past.shape[2]).clamp(max=both.shape[2] - 1))
    dead = (column >= start + num_tokens[:, None])[:, None]  # (B, 1, S)
    joined = take_columns(both, index[:, None].expand(*both.shape[:2], -1))
    return joined.masked_fill(dead if both.dim() == 3 else dead[..., None], 0)


Columns = tuple[Tensor, Tensor, Tensor]  # keys, values (B, K, ..., d) and scores (B, K, ...) of one layer


def update_layer(
    past: Columns,
    new: Columns,
    length: Tensor,
    num_tokens: Tensor,
    cache: LococoConfig,
    head: FusionHead | None,
    fuse: bool,
) -> tuple[Columns, FusedSlots | None, Columns]:
    """One layer's part of an update.

    Args:
        past: the C slots, `length` (B,) of them live.
        new: the n tokens' columns, `num_tokens` (B,) of them valid.
        fuse: whether any row may have more than C live columns then.

    Returns:
        All S columns in order, their fusion, and the C slots after the update.
    """
    slots = past[0].shape[2]
    key, value, scores = (join_columns(p, x, length, num_tokens) for p, x in zip(past, new, strict=True))
    if not fuse:
        return (key, value, scores), None, (key[:, :, :slots], value[:, :, :slots], scores[:, :, :slots])
    total = length + num_tokens
    fused = fuse_slots(key, value, scores, total, cache, head)
    row = (total > slots)[:, None, None]
    pad = slots - cache.mem_size
    after = (
        torch.where(row[..., None], F.pad(fused.key, (0, 0, 0, pad)), key[:, :, :slots]),
        torch.where(row[..., None], F.pad(fused.value, (0, 0, 0, pad)), value[:, :, :slots]),
        torch.where(row, F.pad(fused.scores, (0, pad)), scores[:, :, :slots]),
    )
    return (key, value, scores), fused, after


# --- the decoder ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 up to the weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel pairs (i, i + d/2) of `x` (B, heads, n, d); cos and sin (B, 1, n, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over cached slots and new tokens, which also scores the columns."""

    def __init__(self, g: ModelGeometry) -> None:
        super().__init__()
        self.g = g
        q, kv = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
        self.q_proj = nn.Linear(g.hidden_size, q, bias=g.qkv_bias)
        self.k_proj = nn.Linear(g.hidden_size, kv, bias=g.qkv_bias)
        self.v_proj = nn.Linear(g.hidden_size, kv, bias=g.qkv_bias)
        self.o_proj = nn.Linear(q, g.hidden_size, bias=g.output_bias)
        if g.qk_norm:
            self.q_norm = RMSNorm(g.head_dim, g.rms_norm_eps)
            self.k_norm = RMSNorm(g.head_dim, g.rms_norm_eps)

    def forward(
        self,
        x: Tensor,  # (B, n, hidden)
        cos: Tensor,  # (B, 1, n, d/2)
        sin: Tensor,  # (B, 1, n, d/2)
        past_key: Tensor,  # (B, K, C, d)
        past_value: Tensor,  # (B, K, C, d)
        visible: Tensor,  # (B, n, S) bool
        valid: Tensor,  # (B, n) bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (B, n, hidden), new keys and values (B, K, n, d), probability received by every column (B, K, S)."""
        query, key, value = self.project(x, cos, sin)
        keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)  # (B, K, S, d)
        out, received = self.attend(query, keys, values, visible, valid)
        return out, key, value, received

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, n, d), keys and values (B, K, n, d); queries and keys after RoPE."""
        g = self.g
        batch, n, _ = x.shape
        query = self.q_proj(x).view(batch, n, g.num_heads, g.head_dim)
        key = self.k_proj(x).view(batch, n, g.num_kv_heads, g.head_dim)
        value = self.v_proj(x).view(batch, n, g.num_kv_heads, g.head_dim).transpose(1, 2)  # (B, K, n, d)
        if g.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query.transpose(1, 2), cos, sin)  # (B, H, n, d)
        key = rotate(key.transpose(1, 2), cos, sin)  # (B, K, n, d)
        return query, key, value

    def attend(
        self,
        query: Tensor,  # (B, H, n, d)
        keys: Tensor,  # (B, K, S, d)
        values: Tensor,  # (B, K, S, d)
        visible: Tensor,  # (B, n, S) bool
        weight: Tensor,  # (B, n) bool or float32: what each query counts for in the scores
    ) -> tuple[Tensor, Tensor]:
        """Output (B, n, hidden), and the probability every column receives (B, K, S)."""
        g = self.g
        batch, _, n, _ = query.shape
        # query heads of a group lie side by side and share the columns of one key-value head
        group = query.reshape(batch, g.num_kv_heads, -1, g.head_dim)  # (B, K, H/K * n, d)
        weights = (group @ keys.transpose(2, 3) * g.head_dim**-0.5).view(batch, g.num_kv_heads, -1, n, keys.shape[2])
        weights = weights.float().masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
        received = (weights * weight[:, None, None, :, None]).sum(dim=(2, 3))
        out = weights.to(query.dtype).flatten(2, 3) @ values  # (B, K, H/K * n, d)
        out = out.view(batch, g.num_heads, n, g.head_dim).transpose(1, 2).reshape(batch, n, -1)
        return self.o_proj(out), received


class MLP(nn.Module):
    """The gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, g: ModelGeometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden_size, g.intermediate_size, bias=g.mlp_bias)
        self.up_proj = nn.Linear(g.hidden_size, g.intermediate_size, bias=g.mlp_bias)
        self.down_proj = nn.Linear(g.intermediate_size, g.hidden_size, bias=g.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, g: ModelGeometry) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(g.hidden_size, g.rms_norm_eps)
        self.self_attn = Attention(g)
        self.post_attention_layernorm = RMSNorm(g.hidden_size, g.rms_norm_eps)
        self.mlp = MLP(g)

    def forward(self, x: Tensor, *attention_inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Attention.forward`."""
        out, key, value, received = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), key, value, received


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that checkpoints use."""

    def __init__(self, g: ModelGeometry) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(g) for _ in range(g.num_layers))
        self.norm = RMSNorm(g.hidden_size, g.rms_norm_eps)


class ReferenceModel(nn.Module):
    """The model of a checkpoint, with forwards and updates over an explicit state.

    `ReferenceSession` drives it; call `forward` and `update` directly for other cadences, for a batch whose rows differ
    in length, or under `torch.compile` (a forward has no data-dependent shape or branch).
    """

    inv_freq: Tensor
    update_layer = staticmethod(update_layer)  # a compiled one may take its place

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Loads the weights one by one as `dtype` (default: the checkpoint's) on `device`."""
        super().__init__()
        self.geometry, self.cache = checkpoint.geometry, checkpoint.config
        self.dtype: torch.dtype = getattr(torch, checkpoint.dtype) if dtype is None else dtype
        self.device = torch.device(device)
        with torch.device("meta"):
            self.model = Decoder(self.geometry)
            self.lm_head = nn.Linear(self.geometry.hidden_size, self.geometry.vocab_size, bias=False)
        for name, tensor in checkpoint.tensors.items():
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            setattr(self.get_submodule(owner), leaf, weight)
        if self.geometry.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.heads = [
            HeadWeights(
                head.normalizer,
                tuple((w.to(self.device, self.dtype), b.to(self.device, self.dtype)) for w, b in head.convs),
            )
            for head in checkpoint.heads
        ]
        frequencies, self.rope_scaling = inverse_frequencies(self.geometry.rope, self.geometry.head_dim)
        # float64: a float32 angle is off by 0.06 rad at position 1,000,000
        self.register_buffer("inv_freq", torch.from_numpy(frequencies).to(self.device), persistent=False)

    def empty_state(self, batch: int = 1) -> LococoState:
        """A cache without live slots, at position 0."""
        g, slots = self.geometry, self.cache.capacity
        kv = torch.zeros(batch, g.num_kv_heads, slots, g.head_dim, dtype=self.dtype, device=self.device)
        scores = torch.zeros(batch, g.num_kv_heads, slots, device=self.device)
        zero = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return LococoState(
            keys=[kv] * g.num_layers,
            values=[kv] * g.num_layers,
            scores=[scores] * g.num_layers if self.cache.score_decay > 0 else [],
            length=zero,
            position=zero,
            logits=torch.zeros(batch, g.vocab_size, device=self.device),
        )

    def rotary(self, position: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, n, d/2) in the model's dtype for the n tokens from `position` (B,) on."""
        positions = position[:, None] + torch.arange(n, device=position.device)  # (B, n)
        angles = (positions.double()[..., None] * self.inv_freq)[:, None]  # (B, 1, n, d/2)
        scaling = self.rope_scaling
        return (angles.cos() * scaling).to(self.dtype), (angles.sin() * scaling).to(self.dtype)

    def forward(
        self, ids: Tensor, state: LococoState, num_tokens: Tensor | None = None, return_all: bool = True
    ) -> ForwardResult:
        """Reads tokens beside the live slots.

        Args:
            ids: (B, n) integers.
            state: before these tokens.
            num_tokens: (B,) int64, valid tokens of each row, 1 to n; the others are padding on the right. All if None.
            return_all: logits of every token, else of the last valid one.
        """
        batch, n = ids.shape
        slots = self.cache.capacity
        if num_tokens is None:
            num_tokens = torch.full((batch,), n, dtype=torch.int64, device=ids.device)
        token = torch.arange(n, device=ids.device)
        valid = token < num_tokens[:, None]  # (B, n)
        past = torch.arange(slots, device=ids.device) < state.length[:, None]  # (B, C)
        causal = token <= token[:, None]  # (n, n)
        visible = torch.cat([past[:, None].expand(-1, n, -1), causal.expand(batch, -1, -1)], dim=-1)  # (B, n, S)
        cos, sin = self.rotary(state.position, n)

        weight = valid.float()  # (B, n): what each query counts for in the scores
        past_weight = torch.full_like(weight[:, :1], self.cache.score_decay)  # (B, 1)
        if self.cache.decay_per == "token":
            weight = weight * torch.pow(self.cache.score_decay, (num_tokens[:, None] - 1 - token).clamp(min=0).float())
            past_weight = torch.pow(self.cache.score_decay, num_tokens[:, None].float())

        x = self.model.embed_tokens(ids)  # (B, n, hidden)
        keys, values, scores = [], [], []
        for i, layer in enumerate(self.model.layers):
            x, key, value, received = layer(x, cos, sin, state.keys[i], state.values[i], visible, weight)
            if state.scores:
                received = received + F.pad(past_weight[:, None] * state.scores[i], (0, n))
            keys.append(key)
            values.append(value)
            scores.append(received)
        hidden = self.model.norm(x)
        last = (num_tokens - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.lm_head(hidden if return_all else hidden.gather(1, last)).float()
        return ForwardResult(logits, hidden, keys, values, scores)

    def update(
        self,
        state: LococoState,
        result: ForwardResult,
        num_tokens: Tensor | None = None,
        on_fusion: FusionObserver | None = None,
        fuse: bool | None = None,
    ) -> LococoState:
        """The state after a forward: new columns appended, and rows with more than C live slots fused down to M.

        `fuse` says whether any row fuses, for callers that know; None looks, for which a GPU must be waited for.
        """
        batch, _, n, _ = result.new_keys[0].shape
        slots = self.cache.capacity
        if num_tokens is None:
            num_tokens = torch.full_like(state.length, n)
        total = state.length + num_tokens  # (B,)
        fired = total > slots  # (B,) bool
        if fuse is None:
            fuse = bool(fired.any())
        columns: list[Columns] = []
        for i in range(self.geometry.num_layers):
            received = result.scores[i]
            past = (state.keys[i], state.values[i], received[:, :, :slots])
            new = (result.new_keys[i], result.new_values[i], received[:, :, slots:])
            head = self.heads[i] if self.heads else None
            before, fused, after = self.update_layer(past, new, state.length, num_tokens, self.cache, head, fuse)
            if on_fusion and fused:
                on_fusion(FusionEvent(i, fired, total, *before, fused))
            columns.append(after)
        last = num_tokens - 1 if result.logits.shape[1] > 1 else torch.zeros_like(num_tokens)
        return LococoState(
            keys=[key for key, _, _ in columns],
            values=[value for _, value, _ in columns],
            scores=[score for _, _, score in columns] if state.scores else [],
            length=torch.where(fired, self.cache.mem_size, total),
            position=state.position + num_tokens,
            logits=result.logits[torch.arange(batch, device=last.device), last],
        )


class ReferenceSession:
    """Sequences of equal length read in step, as `lococo_runtime.Session` reads one.

    Args:
        model: shared, never changed.
        batch: number of sequences.
        on_fusion: called for every layer of every fusion.
    """

    def __init__(self, model: ReferenceModel, batch: int = 1, on_fusion: FusionObserver | None = None) -> None:
        self.model = model
        self.on_fusion = on_fusion
        self.state = model.empty_state(batch)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return int(self.state.position[0])

    @property
    def live_slots(self) -> int:
        """Slots in use now, at most M + buffer."""
        return int(self.state.length[0])

    def read(self, ids: Tensor, return_all: bool = True) -> ForwardResult:
        """One forward of `ids` (B, n), however long, and the update that follows it."""
        with torch.inference_mode():
            result: ForwardResult = self.model(ids, self.state, return_all=return_all)
            self.state = self.model.update(self.state, result, on_fusion=self.on_fusion)
        return result

    def prefill(self, ids: Tensor | Sequence[Any], return_all: bool = False) -> Tensor:
        """Reads `ids` (T,) or (B, T) in forwards of at most `block_size` tokens; logits (B, V), or (B, T, V) if all.

        Raises:
            InvalidArgumentError: no token, or one that is not in the vocabulary.
        """
        tokens = self._check(ids)
        block = self.model.cache.block_size
        starts = range(0, tokens.shape[1], block)
        logits = [self.read(tokens[:, start : start + block], return_all).logits for start in starts]
        return torch.cat(logits, dim=1) if return_all else self.state.logits

    def step(self, ids: Tensor | Sequence[int] | int) -> Tensor:
        """Reads one token (a number, or (B,)) in a forward of one; logits (B, V).

        Raises:
            InvalidArgumentError: a token that is not in the vocabulary.
        """
        self.read(self._check(torch.as_tensor(ids).reshape(-1, 1)))
        return self.state.logits

    def _check(self, ids: Tensor | Sequence[Any]) -> Tensor:
        tokens = torch.as_tensor(ids)
        tokens = tokens[None] if tokens.dim() == 1 else tokens
        batch, vocab = len(self.state.length), self.model.geometry.vocab_size
        if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise InvalidArgumentError(f"ids: expected ({batch}, 1 or more) integers, got {list(tokens.shape)}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            wrong = tokens[(tokens < 0) | (tokens >= vocab)][0]
            raise InvalidArgumentError(f"ids: expected tokens of 0 to {vocab - 1}, got {int(wrong)}")
        return tokens.to(self.model.device, torch.int64)
