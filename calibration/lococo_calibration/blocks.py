"""Reading a batch of equally long sequences block by block, with gradients, by any cache policy.

The arithmetic is that of `lococo_export.reference`. Here the cache holds live columns only, so that its shapes follow
from the plan of forwards, which is known before the first one: nothing waits for the device.

Between two fusions of token-by-token decoding nothing is lost by reading the tokens at once: causal attention gives
the same outputs, and only the scores differ, which then count each query by its age (`query_weights`). So the regime
that decodes token by token costs one forward a fusion, not one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from lococo_runtime._exceptions import ConfigError
from lococo_runtime.bundle import LococoConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lococo_export.reference import (
    Attention,
    DecoderLayer,
    FusionHead,
    ReferenceModel,
    mixing_logits,
    rotate,
    select,
    take_columns,
)


@dataclass(frozen=True)
class Forward:
    """One step of a plan: tokens start to stop."""

    start: int
    stop: int
    past: int
    """Live columns before."""
    stepwise: bool
    """These tokens stand for forwards of one token each."""
    fuses: bool
    """The cache is over its capacity afterwards."""


def plan_forwards(
    tokens: int, block_size: int, capacity: int | None, mem_size: int, step_from: int | None = None
) -> list[Forward]:
    """Forwards that read `tokens` tokens from an empty cache.

    Args:
        capacity: the most columns that stay, M + buffer; None never fuses.
        mem_size: M, what a fusion leaves.
        step_from: tokens from here on are read one by one; None reads blocks to the end.
    """
    plan = []
    start = past = 0
    step_from = tokens if step_from is None else min(step_from, tokens)
    while start < tokens:
        stepwise = start >= step_from
        if stepwise and capacity is not None:
            stop = min(start + capacity + 1 - past, tokens)
        else:
            stop = min(start + block_size, tokens if stepwise else step_from)
        live = past + stop - start
        fuses = capacity is not None and live > capacity
        plan.append(Forward(start, stop, past, stepwise, fuses))
        start, past = stop, mem_size if fuses else live
    return plan


@dataclass
class Slots:
    """The cache of one layer; every column is live."""

    key: Tensor  # (B, K, L, d), after RoPE
    value: Tensor  # (B, K, L, d)
    scores: Tensor  # (B, K, L) float32, never with a gradient: selections have none
    sinks: Tensor | None = None
    """(B, K, sinks, d): StreamingLLM's first keys as they were read."""

    def detach(self) -> Slots:
        return Slots(self.key.detach(), self.value.detach(), self.scores, self.sinks)

    def rows(self, rows: list[int] | Tensor) -> Slots:
        """Some sequences of the batch."""
        sinks = None if self.sinks is None else self.sinks[rows]
        return Slots(self.key[rows], self.value[rows], self.scores[rows], sinks)


@dataclass(frozen=True)
class ScoreDecay:
    """How scores age: multiplied by `factor` at every forward, or with every token."""

    factor: float = 0.0
    per_token: bool = False

    def query_weights(self, forward: Forward, device: torch.device) -> Tensor:
        """(1, n) float32: what each query counts for in the scores after the forward.

        All the same in a block, unless scores age by token. Token by token every forward multiplies older scores: with
        0, the published way, only the last query counts.
        """
        n = forward.stop - forward.start
        if not (forward.stepwise or self.per_token):
            return torch.ones(1, n, device=device)
        age = torch.arange(n - 1, -1, -1, dtype=torch.float32, device=device)
        return torch.pow(self.factor, age)[None]  # 0 to the power of 0 is 1

    def past(self, forward: Forward) -> float:
        """What scores from before the forward are multiplied with."""
        return self.factor ** (forward.stop - forward.start if forward.stepwise or self.per_token else 1)

    def receive(self, weights: Tensor, query_weight: Tensor) -> Tensor:
        """What columns receive (R, K, S) from weights (R, K, H / K, n, S) float32 of queries that count (1, n)."""
        return (query_weight.repeat(1, weights.shape[2])[:, None, None] @ weights.flatten(2, 3)).squeeze(2)

    def add(self, past: Tensor, received: Tensor) -> Tensor:
        """Scores (R, K, S) from those before, aged already, and what was received."""
        return past + received


class Policy(Protocol):
    """What happens to a cache that is over its capacity."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    @property
    def mem_size(self) -> int:
        """M: the columns that `compress` leaves."""
        ...

    @property
    def capacity(self) -> int | None:
        """The most columns that stay; None never calls `compress`."""
        ...

    @property
    def decay(self) -> ScoreDecay:
        """How scores of earlier forwards fade."""
        ...

    def compress(self, layer: int, slots: Slots, position: int | Tensor) -> Slots:
        """Exactly `mem_size` columns; `position` tokens (a number, (1,), or (B, 1, 1, 1)) have been read."""
        ...


@dataclass(frozen=True)
class FullCache:
    """Keeps every column: `name`, `mem_size`, `capacity` and `decay` say that as every `Policy` does."""

    name: str = "full"
    mem_size: int = 0
    capacity: int | None = None
    decay: ScoreDecay = ScoreDecay()

    def compress(self, layer: int, slots: Slots, position: int | Tensor) -> Slots:
        return slots


@dataclass(frozen=True)
class Fusion:
    """LoCoCo as `cache` says, with `heads`, one a layer; H2O (arXiv 2306.14048) without."""

    cache: LococoConfig
    heads: Sequence[FusionHead] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if (self.cache.policy == "lococo") != bool(self.heads):
            raise ConfigError(f"policy {self.cache.policy}: got {len(self.heads)} fusion heads")

    @property
    def name(self) -> str:
        return self.cache.policy

    @property
    def mem_size(self) -> int:
        return self.cache.mem_size

    @property
    def capacity(self) -> int | None:
        return self.cache.capacity

    @property
    def decay(self) -> ScoreDecay:
        return ScoreDecay(self.cache.score_decay, self.cache.decay_per == "token")

    def compress(self, layer: int, slots: Slots, position: int | Tensor) -> Slots:
        return self.compress_layers(self.heads[layer : layer + 1], slots)

    def compress_layers(self, heads: Sequence[FusionHead], slots: Slots) -> Slots:
        """`reference.fuse_slots` where every column is live, for several layers at once: rows are (layers * B)."""
        length = torch.full(slots.key.shape[:1], slots.key.shape[2], device=slots.key.device)
        chosen = select(slots.scores, length, self.cache)
        columns = (slots.key, slots.value, slots.scores)
        kept = [take_columns(x, chosen.keep) for x in columns]
        if heads:
            rest = [take_columns(x, chosen.rest) for x in columns]
            parts = zip(*(x.chunk(len(heads)) for x in (rest[0], rest[1], chosen.rest_length)), strict=True)
            logits = [
                mixing_logits(k, v, n, head, self.cache.activation)
                for (k, v, n), head in zip(parts, heads, strict=True)
            ]
            z = torch.cat(logits)  # (layers * B, K, mc, N)
            mixing = z.softmax(-1)
            numbers = [h.normalizer for h in heads]  # a graph being captured cannot copy from the host, but it can fill
            normalizers = torch.stack(
                [x if isinstance(x, Tensor) else torch.full((), x, device=z.device) for x in numbers]
            )
            n = normalizers.repeat_interleave(len(z) // len(heads))[:, None, None, None]
            rest[2] = rest[2][..., None]  # (layers * B, K, N, 1) float32
            for i, (x, w) in enumerate(zip(rest, (mixing, mixing, mixing.detach().float()), strict=True)):
                mixed = torch.lerp(take_columns(x, chosen.residual), w @ x, n.to(x.dtype))
                kept[i] = torch.cat([kept[i], mixed if i < 2 else mixed.squeeze(-1)], 2)
        return Slots(kept[0], kept[1], kept[2].detach())


@dataclass(frozen=True)
class Streaming:
    """StreamingLLM (arXiv 2309.17453): attention sinks and recent tokens, positions within the cache.

    RoPE sees differences of positions alone, so instead of renumbering every column after an eviction the sinks are
    turned onwards by what was evicted, each time from the keys as read: no rounding accumulates.

    Attributes:
        model: whose RoPE it is.
        mem_size: columns left by an eviction.
        buffer: columns above `mem_size` before the next one.
        num_sinks: first columns, always kept.
        name, decay: as of every `Policy`.
    """

    model: ReferenceModel = field(repr=False)
    mem_size: int
    buffer: int = 16
    num_sinks: int = 4
    name: str = "streaming"
    decay: ScoreDecay = ScoreDecay()

    def __post_init__(self) -> None:
        if not self.num_sinks < self.mem_size:
            raise ConfigError(f"mem_size: expected more than {self.num_sinks} sinks, got {self.mem_size}")

    @property
    def capacity(self) -> int | None:
        return self.mem_size + self.buffer

    def compress(self, layer: int, slots: Slots, position: int | Tensor) -> Slots:
        first = slots.key[:, :, : self.num_sinks] if slots.sinks is None else slots.sinks
        # the next token is `mem_size` columns from the first sink, and stands at `position`
        angles = (position - self.mem_size) * self.model.inv_freq  # (..., d/2) float64
        turned = rotate(first.float(), angles.cos().float(), angles.sin().float()).to(first.dtype)
        recent = self.mem_size - self.num_sinks
        kept = [torch.cat([x[:, :, : self.num_sinks], x[:, :, -recent:]], 2) for x in (slots.value, slots.scores)]
        return Slots(torch.cat([turned, slots.key[:, :, -recent:]], 2), kept[0], kept[1], first)


# --- attention --------------------------------------------------------------------------------------------------------


def visible_columns(forward: Forward, device: torch.device) -> Tensor:
    """(1, n, L + n) bool: every live column, and new ones up to the token itself."""
    n = forward.stop - forward.start
    return torch.ones(1, n, forward.past + n, dtype=torch.bool, device=device).tril(forward.past)


def attend(
    query: Tensor,  # (R, H, n, d)
    keys: Tensor,  # (R, K, S, d)
    values: Tensor,  # (R, K, S, d)
    visible: Tensor,  # (1, n, S) bool
    weight: Tensor,  # (1, n) float32
    decay: ScoreDecay,
) -> tuple[Tensor, Tensor]:
    """`Attention.attend` before the output projection: (R, H, n, d), and what every column receives (R, K, S).

    Scores have no gradient, so that the output can come from a kernel that keeps no probabilities.
    """
    group = query.shape[1] // keys.shape[1]
    with torch.no_grad():
        n, columns = query.shape[2], keys.shape[2]
        rows = query.detach().reshape(*keys.shape[:2], group * n, -1)
        weights = (
            (rows @ keys.detach().transpose(2, 3)).mul_(query.shape[3] ** -0.5).view(*keys.shape[:2], group, n, columns)
        )
        weights = weights.float().masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
        received = decay.receive(weights, weight)
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible[:, None])
    return out, received


def read_layer(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor,
    visible: Tensor, weight: Tensor, decay: ScoreDecay,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`DecoderLayer.forward`: output (B, n, hidden), all keys and values (B, K, L + n, d), what columns received."""
    attention = layer.self_attn
    query, key, value = attention.project(layer.input_layernorm(x), cos, sin)
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    mixed, received = attend(query, keys, values, visible, weight, decay)
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x)), keys, values, received


def append(
    slots: Slots | None, key: Tensor, value: Tensor, received: Tensor, forward: Forward, decay: ScoreDecay
) -> Slots:
    """The cache after a forward, before any fusion; `key` and `value` hold all L + n columns already."""
    received = received.detach()
    if decay.factor and slots is not None:
        past = slots.scores * decay.past(forward)
        received = decay.add(F.pad(past, (0, received.shape[-1] - past.shape[-1])), received)
    return Slots(key, value, received, None if slots is None else slots.sinks)


class BlockReader:
    """A batch of sequences, read through the whole model by one policy.

    Args:
        checkpointing: compute layers again in the backward pass instead of keeping what they computed.
    """

    def __init__(self, model: ReferenceModel, policy: Policy, *, checkpointing: bool = False) -> None:
        self.model, self.policy, self.checkpointing = model, policy, checkpointing
        self.slots: list[Slots] = []
        self.position: int | Tensor = 0
        """Tokens read; on the device, (1,), where a CUDA graph counts them."""

    def read(self, ids: Tensor, forward: Forward) -> Tensor:
        """Reads ids (B, n), the tokens of `forward`: hidden states (B, n, hidden), after the final norm."""
        model, decay = self.model, self.policy.decay
        visible = visible_columns(forward, ids.device)
        weight = decay.query_weights(forward, ids.device)
        position = self.position
        if isinstance(position, int):
            position = torch.full((1,), position, device=ids.device)
        cos, sin = model.rotary(position, ids.shape[1])
        x = model.model.embed_tokens(ids)
        g = model.geometry
        empty = x.new_zeros(len(ids), g.num_kv_heads, 0, g.head_dim)
        after = []
        for i, layer in enumerate(model.model.layers):
            old = self.slots[i] if self.slots else None
            past_key, past_value = (old.key, old.value) if old else (empty, empty)
            inputs = (cast(DecoderLayer, layer), x, cos, sin, past_key, past_value, visible, weight, decay)
            if self.checkpointing and torch.is_grad_enabled():
                x, keys, values, received = checkpoint(read_layer, *inputs, use_reentrant=False)
            else:
                x, keys, values, received = read_layer(*inputs)
            after.append(append(old, keys, values, received, forward, decay))
        self.slots = after
        self.position = self.position + ids.shape[1]
        hidden: Tensor = model.model.norm(x)
        return hidden

    def compress(self) -> None:
        """Brings every layer down to M columns."""
        self.slots = [self.policy.compress(i, slots, self.position) for i, slots in enumerate(self.slots)]

    def detach(self) -> None:
        """Ends the gradient's way back here."""
        self.slots = [slots.detach() for slots in self.slots]


LayerObserver = Callable[[int, Attention, Tensor, Tensor, Tensor, Tensor], None]
"""Called with layer, its attention, query (B, H, T, d), key and value (B, K, T, d), output (B, T, hidden)."""


def read_uncompressed(model: ReferenceModel, ids: Tensor, on_layer: LayerObserver | None = None) -> Tensor:
    """Hidden states (B, T, hidden) of ids (B, T) with the full cache, without gradients."""

    cos, sin = model.rotary(torch.zeros(1, dtype=torch.int64, device=ids.device), ids.shape[1])
    with torch.no_grad():
        x: Tensor = model.model.embed_tokens(ids)
        for i, layer in enumerate(model.model.layers):
            block = cast(DecoderLayer, layer)
            attention = block.self_attn
            query, key, value = attention.project(block.input_layernorm(x), cos, sin)
            group = query.shape[1] // key.shape[1]
            keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)  # (B, H, T, d)
            mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True)  # (B, H, T, d)
            out = attention.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, hidden)
            if on_layer:
                on_layer(i, attention, query, key, value, out)
            x = x + out
            x = x + block.mlp(block.post_attention_layernorm(x))
        hidden: Tensor = model.model.norm(x)
    return hidden
