"""Greedy generation by any cache policy, for many prompts side by side.

Prompts differ in length, and a fusion fires for each of them where it would fire if it were alone: blocks that lie at
the same place are read together, what is left of every prompt by itself, and then all of them go on token by token in
caches of one width, whose live columns are counted row by row.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from lococo_runtime import InvalidArgumentError
from torch import Tensor

from lococo_export.reference import ReferenceModel

from .blocks import Forward, Policy, Slots, append, read_layer
from .evaluate import PolicySession

Stop = Callable[[int, list[int]], bool]
"""Given a prompt's number and the tokens found so far: no more are wanted."""


@torch.inference_mode()
def generate(
    model: ReferenceModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    *,
    block_size: int,
    batch: int = 8,
    stop: Stop | None = None,
) -> list[list[int]]:
    """The likeliest tokens after every prompt, one after the other, up to a token that ends the text (left out).

    Args:
        max_new_tokens: of every prompt, at least 1.
        batch: prompts read at once; they are decoded all at once.

    Raises:
        InvalidArgumentError: an empty prompt, or nothing to generate.
    """
    if not all(prompts) or min(max_new_tokens, default=1) < 1:
        raise InvalidArgumentError("generate: expected prompts with tokens, and at least 1 new token for each")
    found: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return found
    decoder = _Decoder(model, policy, _read_prompts(model, policy, prompts, block_size, batch), max(max_new_tokens))
    ends, numbers = set(model.geometry.eos_token_ids), decoder.numbers
    going = set(numbers)
    while True:
        for number, token in zip(numbers, decoder.tokens.tolist(), strict=True):
            if number in going:
                if token not in ends:
                    found[number].append(token)
                done = token in ends or len(found[number]) == max_new_tokens[number]
                if done or (stop is not None and stop(number, found[number])):
                    going.remove(number)
        if not going:
            return found
        if 2 * len(going) <= len(numbers):
            decoder.keep([row for row, number in enumerate(numbers) if number in going])
            numbers = decoder.numbers
        decoder.step()


@dataclasses.dataclass(frozen=True)
class _Read:
    """Prompts that have been read, of one length."""

    numbers: list[int]
    session: PolicySession
    tokens: Tensor  # (R,) the likeliest next ones


def _read_prompts(
    model: ReferenceModel, policy: Policy, prompts: Sequence[Sequence[int]], block_size: int, batch: int
) -> list[_Read]:
    by_blocks: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_blocks[len(prompt) // block_size].append(number)
    done = []
    for blocks, members in by_blocks.items():
        for first in range(0, len(members), batch):
            group, whole = members[first : first + batch], blocks * block_size
            session = PolicySession(model, policy, block_size)
            ids = torch.tensor([prompts[i][:whole] for i in group], device=model.device, dtype=torch.int64)
            best = session.read(ids, last_only=True)[:, -1].argmax(-1) if whole else ids.new_zeros(len(group))
            by_length: dict[int, list[int]] = defaultdict(list)
            for row, i in enumerate(group):
                by_length[len(prompts[i])].append(row)
            for length, rows in by_length.items():
                part, numbers = session.rows(rows), [group[row] for row in rows]
                tokens = best[rows]
                if length > whole:
                    rest = torch.tensor([prompts[i][whole:] for i in numbers], device=model.device)
                    tokens = part.read(rest, last_only=True)[:, -1].argmax(-1)
                done.append(_Read(numbers, part, tokens))
    return done


class _Decoder:
    """Rows that go on token by token, in caches of `width` columns, of which the first `live` are used: the policy's
    capacity, or as many as there will ever be."""

    def __init__(self, model: ReferenceModel, policy: Policy, read: list[_Read], most: int) -> None:
        self.model, self.policy = model, policy
        self.numbers = [number for part in read for number in part.numbers]
        self.tokens = torch.cat([part.tokens for part in read])  # (R,)
        counts = [len(part.numbers) for part in read]
        self.live = [part.session.live for part, n in zip(read, counts, strict=True) for _ in range(n)]
        position = [part.session.position for part, n in zip(read, counts, strict=True) for _ in range(n)]
        self.position = torch.tensor(position, device=model.device)  # (R,)
        self.width = max(self.live) + most if policy.capacity is None else policy.capacity
        self.compressed = [part.session.slots[0].sinks is not None for part, n in zip(read, counts, strict=True)
                           for _ in range(n)]  # fmt: skip
        self.slots = [self._together([part.session.slots[i] for part in read]) for i in range(len(model.model.layers))]

    def _together(self, parts: list[Slots]) -> Slots:
        def stack(tensors: list[Tensor], columns: int) -> Tensor:
            shape = (len(self.numbers), tensors[0].shape[1], columns, *tensors[0].shape[3:])
            whole, row = tensors[0].new_zeros(shape), 0
            for x in tensors:
                whole[row : row + len(x), :, : x.shape[2]] = x
                row += len(x)
            return whole

        known = [p.sinks.shape[2] for p in parts if p.sinks is not None]
        sinks = None
        if known:
            sinks = stack([p.key[:, :, :0] if p.sinks is None else p.sinks for p in parts], known[0])
        columns = [stack([getattr(p, name) for p in parts], self.width) for name in ("key", "value", "scores")]
        return Slots(columns[0], columns[1], columns[2], sinks)

    def keep(self, rows: list[int]) -> None:
        """Only these go on."""
        self.numbers, self.live = ([values[r] for r in rows] for values in (self.numbers, self.live))
        self.compressed = [self.compressed[r] for r in rows]
        self.tokens, self.position = self.tokens[rows], self.position[rows]
        self.slots = [slots.rows(rows) for slots in self.slots]

    def step(self) -> None:
        """Reads `tokens` and finds the next ones."""
        model, decay, width = self.model, self.policy.decay, self.width
        # a new column stands last while it is read, then right behind the live ones
        forward = Forward(0, 1, width, True, False)
        live = torch.tensor(self.live, device=model.device)
        columns = torch.arange(width + 1, device=model.device)
        visible = ((columns < live[:, None]) | (columns == width))[:, None]  # (R, 1, width + 1)
        weight = decay.query_weights(forward, model.device)
        cos, sin = model.rotary(self.position, 1)
        rows = torch.arange(len(live), device=model.device)
        x = model.model.embed_tokens(self.tokens[:, None])
        self.position += 1
        self.live = [n + 1 for n in self.live]
        # the sinks of rows that compress for the first time are not known yet
        fusing = [_Fusing(self, known) for known in (False, True)]
        for i, layer in enumerate(model.model.layers):
            old = self.slots[i]
            x, keys, values, received = read_layer(layer, x, cos, sin, old.key, old.value, visible, weight, decay)  # type: ignore[arg-type]
            slots = append(old, keys, values, received, forward, decay)
            for column in (slots.key, slots.value, slots.scores):
                column[rows, :, live] = column[:, :, -1]
            for some in fusing:
                some.compress(self.policy, i, slots)
            slots.key, slots.value, slots.scores = (y[:, :, :width] for y in (slots.key, slots.value, slots.scores))
            self.slots[i] = slots
        has_sinks = self.slots[0].sinks is not None
        for r in (r for some in fusing for r in some.rows):
            self.live[r], self.compressed[r] = self.policy.mem_size, has_sinks
        self.tokens = model.lm_head(model.model.norm(x))[:, 0].float().argmax(-1)


class _Fusing:
    """The rows of a decoder that are over their capacity: all their columns are live.

    Args:
        known: those whose sinks are known, or those whose are not.
    """

    def __init__(self, decoder: _Decoder, known: bool) -> None:
        states = zip(decoder.live, decoder.compressed, strict=True)
        self.known = known
        self.rows = [r for r, (live, c) in enumerate(states) if live > decoder.width and c == known]
        self._index = torch.tensor(self.rows, device=decoder.model.device, dtype=torch.int64)  # copied once a step
        self._position = decoder.position[self._index][:, None, None, None]

    def compress(self, policy: Policy, layer: int, slots: Slots) -> None:
        """In place."""
        if not self.rows:
            return
        part = slots.rows(self._index)
        if not self.known:
            part.sinks = None
        new = policy.compress(layer, part, self._position)
        columns = new.key.shape[2]
        for whole, fused in ((slots.key, new.key), (slots.value, new.value), (slots.scores, new.scores)):
            whole[self._index, :, :columns] = fused
        if new.sinks is not None:
            if slots.sinks is None:
                slots.sinks = new.sinks.new_zeros(len(slots.key), *new.sinks.shape[1:])
            slots.sinks[self._index] = new.sinks
