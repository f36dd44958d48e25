"""What is trained: fusion heads, and weights of the model beside them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from lococo_runtime.bundle import LococoConfig, ModelGeometry
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lococo_export.checkpoints import HeadWeights
from lococo_export.reference import ReferenceModel


class TrainableHead(nn.Module):
    """The fusion head of one layer: a normalizer and a stack of convolutions, kept in float32.

    Args:
        start: weights to begin with.
        dtype: of the cache, in which fusions compute.
    """

    def __init__(self, start: HeadWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # a tensor of no dimension takes on the dtype of what it multiplies
        self.normalizer = nn.Parameter(torch.tensor(start.normalizer, dtype=torch.float32))
        self.weights = nn.ParameterList(weight.float().clone() for weight, _ in start.convs)
        self.biases = nn.ParameterList(bias.float().clone() for _, bias in start.convs)

    @property
    def convs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weights and biases in the cache's dtype; gradients reach the parameters."""
        pairs = zip(self.weights, self.biases, strict=True)
        return tuple((w.to(self.dtype), b.to(self.dtype)) for w, b in pairs)

    def export(self, dtype: torch.dtype) -> HeadWeights:
        """A copy to save. The normalizer stays float32."""
        pairs = zip(self.weights, self.biases, strict=True)
        convs = tuple((w.detach().to("cpu", dtype), b.detach().to("cpu", dtype)) for w, b in pairs)
        return HeadWeights(float(self.normalizer.detach()), convs)


def initial_heads(
    geometry: ModelGeometry, cache: LococoConfig, *, seed: int, std: float, normalizer: float
) -> tuple[HeadWeights, ...]:
    """Random heads: the first convolution of standard deviation `std`, later ones 1/sqrt(inputs), biases zero.

    A small `std` makes the softmax over the evicted columns flat: mixing then averages everything, which is worse than
    no fusion, and the normalizer falls to 0 before the convolutions have learned (docs/fitting.md).
    """
    generator = torch.Generator().manual_seed(seed)
    inner = [cache.num_mixed * cache.conv_expand] * (cache.num_conv_layers - 1)
    channels = [2 * geometry.head_dim, *inner, cache.num_mixed]

    def conv(j: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(n_out, n_in, cache.kernel_size, generator=generator)
        return weight * (std if j == 0 else (n_in * cache.kernel_size) ** -0.5), torch.zeros(n_out)

    return tuple(
        HeadWeights(normalizer, tuple(conv(j, *pair) for j, pair in enumerate(itertools.pairwise(channels))))
        for _ in range(geometry.num_layers)
    )


class TunedWeights:
    """Weights of the model that are trained too; float32 masters, as steps are too small for half precision.

    Args:
        groups: "norms" (every RMSNorm), "embeddings" (with them the output matrix, where it is tied).
    """

    def __init__(self, model: ReferenceModel, groups: Sequence[str]) -> None:
        wanted = {"norms": "norm", "embeddings": "embed_tokens"}
        chosen = [wanted[g] for g in groups]
        self.weights = {
            name: p
            for name, p in model.named_parameters()
            if any(part in name.split(".")[-2] for part in chosen) and name.endswith(".weight")
        }
        for p in self.weights.values():
            p.requires_grad_(True)
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.weights.values()]

    def zero_grad(self) -> None:
        for p in self.weights.values():
            if p.grad is not None:
                p.grad.zero_()

    def gather(self) -> None:
        """Gradients to the masters."""
        for p, master in zip(self.weights.values(), self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()

    @torch.no_grad()
    def scatter(self) -> None:
        """The masters' values to the model."""
        for p, master in zip(self.weights.values(), self.masters, strict=True):
            p.copy_(master)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        self.scatter()

    def copy_file(self, source: Path, target: Path) -> None:
        """Copies a file of the checkpoint, with the tuned weights in their place if it is one of tensors."""
        ours = {n: m.detach() for n, m in zip(self.weights, self.masters, strict=True)}
        if source.suffix == ".safetensors" and ours:
            with safe_open(source, framework="pt") as file:
                names = list(file.keys())
                if not ours.keys().isdisjoint(names):
                    tensors = {n: file.get_tensor(n) for n in names}
                    replaced = {n: ours[n].to("cpu", t.dtype) for n, t in tensors.items() if n in ours}
                    save_file({**tensors, **replaced}, target, metadata=file.metadata())
                    shutil.copymode(source, target)
                    return
        shutil.copyfile(source, target)
