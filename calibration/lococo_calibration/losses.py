"""The losses of a step, and their gradients.

Three losses, weighted: next-token loss and distillation from the uncompressed model's logits (both read the model with
the compressed cache and send gradients back through all of it), and the reconstruction of every layer's attention
output against the full cache. The last takes a layer's inputs from one uncompressed forward, so that each layer is
trained on its own, with one layer in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lococo_export.cuda_graphs import capture
from lococo_export.reference import Attention, ReferenceModel

from .blocks import BlockReader, Fusion, Slots, append, attend, read_uncompressed, visible_columns
from .evaluate import LOGITS_AT_ONCE
from .heads import TrainableHead
from .settings import FitSettings, TrainingPlan


@dataclass
class StepLosses:
    """Sums over the batches of a step, on the device; each is a mean over tokens."""

    layers: Tensor  # (layers,) squared error of the attention output over its mean square
    lm: Tensor  # () nats a token
    distill: Tensor  # () nats a token


@dataclass(frozen=True)
class LayerInputs:
    """What one layer computes with the full cache."""

    attention: Attention
    query: Tensor  # (B, H, T, d)
    key: Tensor  # (B, K, T, d)
    value: Tensor  # (B, K, T, d)
    target: Tensor  # (B, T, hidden)


class Losses:
    """Computes losses of a batch and leaves their gradients in the heads, and in weights of the model that are tuned.

    Args:
        teacher: whose logits to distil, where the model itself changes.
    """

    def __init__(
        self, model: ReferenceModel, heads: nn.ModuleList, settings: FitSettings, teacher: ReferenceModel | None = None
    ) -> None:
        self.model, self.settings = model, settings
        self.teacher = teacher or model
        self.policy = Fusion(settings.cache, [h for h in heads if isinstance(h, TrainableHead)])

    def new(self) -> StepLosses:
        zero = torch.zeros(self.model.geometry.num_layers, device=self.model.device)
        return StepLosses(zero, zero[:1].sum(), zero[:1].sum())

    def backward(self, ids: Tensor, plan: TrainingPlan, share: float, into: StepLosses) -> None:
        """Reads ids (B, >= plan.tokens), adds `share` of every loss to `into` and of its gradient to the heads."""
        s = self.settings
        ids = ids[:, : plan.tokens]
        target = None
        apart = self.teacher is not self.model
        if s.reconstruction_weight or (s.distill_weight and not apart):
            target = self._uncompressed(ids, plan, share, into)
        if s.distill_weight and apart:
            target = read_uncompressed(self.teacher, ids)
        if s.through_model:
            self._language(ids, plan, target if s.distill_weight else None, share, into)

    def _uncompressed(self, ids: Tensor, plan: TrainingPlan, share: float, into: StepLosses) -> Tensor:
        """One uncompressed forward, which every layer is fitted beside: hidden states (B, T, hidden)."""
        decay, device = self.policy.decay, ids.device
        masks = [(visible_columns(f, device), decay.query_weights(f, device)) for f in plan.forwards]
        waiting: list[LayerInputs] = []

        def fit_layer(i: int, *inputs: Any) -> None:
            waiting.append(LayerInputs(*inputs))
            if len(waiting) == self.settings.layers_at_once or i == self.model.geometry.num_layers - 1:
                layers = slice(i + 1 - len(waiting), i + 1)
                with torch.enable_grad():
                    into.layers[layers] += share * self._layers(layers, waiting, plan, masks, share)
                waiting.clear()

        return read_uncompressed(self.model, ids, fit_layer if self.settings.reconstruction_weight else None)

    def _layers(
        self,
        layers: slice,
        inputs: list[LayerInputs],
        plan: TrainingPlan,
        masks: list[tuple[Tensor, Tensor]],
        share: float,
    ) -> Tensor:
        """Losses of some layers (layers,); they read the whole window with compressed caches, side by side."""
        count = len(inputs)
        query, key, value = (torch.cat([getattr(x, name) for x in inputs]) for name in ("query", "key", "value"))
        target = torch.stack([x.target for x in inputs])  # (layers, B, T, hidden)
        power = torch.stack([x.float().square().mean((1, 2), keepdim=True) for x in target])  # (layers, B, 1, 1)
        project = torch.stack([x.attention.o_proj.weight for x in inputs]).transpose(1, 2)  # (layers, H * d, hidden)
        bias = [x.attention.o_proj.bias for x in inputs]
        heads = self.policy.heads[layers]
        total = torch.zeros(count, device=target.device)
        slots: Slots | None = None
        segment = _Segment(self.settings.bptt, share * self.settings.reconstruction_weight)
        for forward, (visible, weight) in zip(plan.forwards, masks, strict=True):
            part = slice(forward.start, forward.stop)
            keys, values = key[:, :, part], value[:, :, part]
            if slots is not None:
                keys, values = torch.cat([slots.key, keys], 2), torch.cat([slots.value, values], 2)
            mixed, received = attend(
                query[:, :, part], keys, values, visible, weight, self.policy.decay
            )  # (layers * B, H, n, d)
            if mixed.requires_grad:
                goal = target[:, :, part]
                out = torch.bmm(mixed.transpose(1, 2).reshape(count, -1, project.shape[1]), project).view(goal.shape)
                if bias[0] is not None:
                    out = out + torch.stack([b for b in bias if b is not None])[:, None, None]
                error = ((out.float() - goal.float()).square() / power).mean((1, 2, 3))  # (layers,)
                error = error * ((forward.stop - forward.start) / plan.scored_tokens)
                total += error.detach()
                segment.add(error.sum())
            slots = append(slots, keys, values, received, forward, self.policy.decay)
            if forward.fuses and forward is not plan.forwards[-1]:
                if segment.ends(plan.trains(forward)):
                    slots = slots.detach()
                with torch.set_grad_enabled(plan.trains(forward)):
                    slots = self.policy.compress_layers(heads, slots)
        segment.backward()
        return total

    def _language(
        self, ids: Tensor, plan: TrainingPlan, teacher: Tensor | None, share: float, into: StepLosses
    ) -> None:
        s = self.settings
        reader = BlockReader(self.model, self.policy, checkpointing=s.checkpointing)
        segment = _Segment(s.bptt, share)
        # the last token of a window has no next one
        count = len(ids) * (plan.scored_tokens - 1)
        for forward in plan.forwards:
            scored = forward.start >= plan.first_scored
            with torch.set_grad_enabled(scored):
                hidden = reader.read(ids[:, forward.start : forward.stop], forward)
            if scored:
                targets = ids[:, forward.start + 1 : forward.stop + 1]
                n = targets.shape[1]
                goal = None if teacher is None else teacher[:, forward.start : forward.start + n]
                lm, distill = self._token_losses(hidden[:, :n], targets, goal)
                into.lm += share / count * lm.detach()
                into.distill += share / count * distill.detach()
                segment.add((s.lm_weight * lm + s.distill_weight * distill) / count)
            if forward.fuses and forward is not plan.forwards[-1]:
                if segment.ends(plan.trains(forward)):
                    reader.detach()
                with torch.set_grad_enabled(plan.trains(forward)):
                    reader.compress()
        segment.backward()

    def _token_losses(self, hidden: Tensor, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums of next-token loss and divergence from the teacher; logits exist a piece at a time."""

        def piece(h: Tensor, t: Tensor, goal: Tensor | None) -> tuple[Tensor, Tensor]:
            logits = self.model.lm_head(h).float()
            if goal is None:
                return F.cross_entropy(logits, t, reduction="sum"), logits.new_zeros(())
            wanted = self.teacher.lm_head(goal).float().log_softmax(-1)
            found = logits.log_softmax(-1)
            distill = F.kl_div(found, wanted, reduction="sum", log_target=True)
            return F.nll_loss(found, t, reduction="sum"), distill

        h, t = hidden.flatten(0, 1), targets.flatten()
        goal = None if teacher is None else teacher.flatten(0, 1)
        lm, distill = h.new_zeros((), dtype=torch.float32), h.new_zeros((), dtype=torch.float32)
        for a in range(0, len(t), LOGITS_AT_ONCE):
            part = slice(a, a + LOGITS_AT_ONCE)
            inputs = (h[part], t[part], None if goal is None else goal[part])
            losses = checkpoint(piece, *inputs, use_reentrant=False, preserve_rng_state=False)
            lm, distill = lm + losses[0], distill + losses[1]
        return lm, distill


class GraphedBatch:
    """`Losses.backward` of one plan, captured once and replayed: tens of thousands of small kernels a batch would
    otherwise wait for the CPU that launches them.

    Args:
        ids: (B, context), of the shape that all batches will have.
    """

    def __init__(self, losses: Losses, plan: TrainingPlan, ids: Tensor, share: float) -> None:
        self.ids, self.into = ids.clone(), losses.new()
        # gradients come to exist in the runs before the capture
        self.graph = capture(lambda: losses.backward(self.ids, plan, share, self.into), ids.device)

    def backward(self, ids: Tensor, into: StepLosses) -> None:
        """Adds to the gradients, and the losses to `into`."""
        self.ids.copy_(ids)
        for total in (self.into.layers, self.into.lm, self.into.distill):
            total.zero_()
        self.graph.replay()
        into.layers += self.into.layers
        into.lm += self.into.lm
        into.distill += self.into.distill


class _Segment:
    """Truncated backpropagation: the losses since the gradient's way back was last cut."""

    def __init__(self, limit: int, scale: float) -> None:
        self.limit, self.scale = limit, scale
        self.fusions = 0
        self.loss: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss

    def ends(self, trains: bool) -> bool:
        """Called before every fusion: whether to cut here. Gradients are then taken."""
        if self.fusions < self.limit:
            self.fusions += trains
            return False
        self.backward()
        self.fusions = 1
        return True

    def backward(self) -> None:
        if self.loss is not None:
            (self.loss * self.scale).backward()  # type: ignore[no-untyped-call]
        self.loss = None
