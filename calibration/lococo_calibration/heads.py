"""Fusion heads that are being trained."""

from __future__ import annotations

import itertools

import torch
from lococo_runtime.bundle import LococoConfig, ModelGeometry
from torch import Tensor, nn

from lococo_export.checkpoints import HeadWeights


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
