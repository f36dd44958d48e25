"""Which columns someone else's fusion took, read off its outcome.

Two scores a rounding apart may select different columns, which is no error, but moves every slot between the two. So a
fusion is judged in two steps: were the columns it took within rounding of the best, and are its slots right for them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from lococo_runtime.bundle import LococoConfig
from torch import Tensor

from .reference import FusionHead, Selection, fuse_slots, select, take_columns

EXACT = "donot_use_mm_for_euclid_dist"  # of torch.cdist: columns may be much alike
ANCHOR_SHARE = 0.05  # anchors that weigh less in their slot cannot be read off it


@dataclass(frozen=True)
class TakenSelection:
    """What a fusion took.

    Attributes:
        selection: to fuse the same columns again.
        swapped: columns and anchors, over all heads, that the scores rank otherwise.
        margin: by how much, relative to itself, the best column left out outscores the worst one taken; 0 if none does.
    """

    selection: Selection
    swapped: int
    margin: float


def taken_selection(
    fused: tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    length: Tensor,
    cache: LococoConfig,
    head: FusionHead | None,
) -> TakenSelection | None:
    """Finds every kept slot, and every anchor of a mixed one, among the columns before the fusion.

    Args:
        fused: keys and values (1, K, M, d), the outcome.
        key, value: (1, K, S, d) the columns before, up to rounding; zero from `length` on.
        scores: (1, K, S) float32, up to rounding.
        length: (1,) live columns.
        cache, head: of the layer.

    Returns:
        None if the outcome cannot be such a fusion: slots out of cache order, or without the most recent columns.
    """
    scale = key.float().norm() / value.float().norm().clamp(min=1e-30)  # keys and values count alike

    def join(k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k.float(), v.float() * scale], dim=-1)

    ours, columns = join(*fused), join(key, value)  # (1, K, M, 2d), (1, K, S, 2d)
    column = torch.arange(columns.shape[2], device=key.device)  # (S,)
    own = select(scores, length, cache)
    live = (column < length[:, None, None]).expand(scores.shape)  # (1, K, S)
    keep = _nearest(ours[:, :, : cache.keep], columns, live)  # (1, K, keep)
    end = int(length[0])
    recent = keep[..., cache.keep - cache.local_len :]
    if not _ascends(keep) or not bool((recent == torch.arange(end - cache.local_len, end, device=key.device)).all()):
        return None
    heavy = keep[..., : cache.keep - cache.local_len]
    candidates = live & (column < end - cache.local_len)
    swapped, margin = _outranked(scores, candidates, heavy, own.keep[..., : cache.keep - cache.local_len])
    chosen = select(scores, length, cache, keep)
    if head is None or cache.num_mixed == 0:
        return TakenSelection(chosen, swapped, margin)

    n = float(head.normalizer)
    if abs(1 - n) >= ANCHOR_SHARE:
        # a mixed slot less its average is its anchor
        rest = take_columns(columns, chosen.rest)  # (1, K, R, 2d)
        mixing = fuse_slots(key, value, scores, length, cache, head, chosen).mixing.float()  # (1, K, mc, R)
        anchors = (ours[:, :, cache.keep :] - n * (mixing @ rest)) / (1 - n)
        rest_live = (torch.arange(rest.shape[2], device=key.device) < chosen.rest_length[:, None, None]).expand(
            rest.shape[:3]
        )
        residual = _nearest(anchors, rest, rest_live)
        if not _ascends(residual):
            return None
        rest_scores = take_columns(scores, chosen.rest)
        more, worse = _outranked(rest_scores, rest_live, residual, chosen.residual)
        chosen = dataclasses.replace(chosen, residual=residual)
        swapped, margin = swapped + more, max(margin, worse)
    return TakenSelection(chosen, swapped, margin)


def _nearest(slots: Tensor, columns: Tensor, live: Tensor) -> Tensor:
    """For every slot (1, K, m, c) the index (1, K, m) of the nearest live column (1, K, S, c)."""
    distance = torch.cdist(slots, columns, compute_mode=EXACT).masked_fill(~live[:, :, None], torch.inf)
    return distance.argmin(dim=-1)


def _ascends(index: Tensor) -> bool:
    return bool((index.diff(dim=-1) > 0).all())


def _outranked(scores: Tensor, candidates: Tensor, taken: Tensor, best: Tensor) -> tuple[int, float]:
    """How many of `taken` (1, K, m) are not of `best`, and the margin of the candidates that were left out instead."""
    is_taken = torch.zeros_like(candidates).scatter(2, taken, True)
    is_best = torch.zeros_like(candidates).scatter(2, best, True)
    swapped = int((is_taken & ~is_best).sum())
    if swapped == 0:
        return 0, 0.0
    left_out = scores.masked_fill(~candidates | is_taken, -torch.inf).amax(dim=-1)  # (1, K)
    worst = scores.masked_fill(~is_taken, torch.inf).amin(dim=-1)
    margin = ((left_out - worst) / left_out.abs().clamp(min=1e-30)).clamp(min=0)
    return swapped, float(margin.max())
