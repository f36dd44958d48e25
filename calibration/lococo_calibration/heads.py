"""What is trained: fusion heads, and weights of the model beside them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lococo_runtime._exceptions import UnsupportedError
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
        lora: rank of low-rank updates (arXiv 2106.09685) of the attention's projections; 0 has none.
        seed: of LoRA's initial weights, which have to be alike in every process and when a run is repeated.

    Raises:
        UnsupportedError: LoRA without peft.
    """

    def __init__(
        self, model: ReferenceModel, groups: Sequence[str], lora: int = 0, lora_alpha: float = 16.0, seed: int = 0
    ) -> None:
        self.model, self.lora = model, lora
        if lora:
            try:
                from peft import LoraConfig, inject_adapter_in_model
            except ModuleNotFoundError as e:
                raise UnsupportedError("--lora needs peft: pip install 'lococo-export[fit-all]'") from e
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            config = LoraConfig(r=lora, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=targets)
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed)
                inject_adapter_in_model(config, model.model)
        wanted = {"norms": "norm", "embeddings": "embed_tokens"}
        chosen = [wanted[g] for g in groups]
        self.weights: dict[str, nn.Parameter] = {}
        for name, p in model.named_parameters():
            owner = name.split(".")[-2]
            if ".lora_" in name or any(part in owner for part in chosen):
                self.weights[name] = p
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

    def gradient_norm(self) -> Tensor:
        """() of all masters together."""
        norms = [m.grad.norm() for m in self.masters if m.grad is not None]
        return torch.stack(norms).norm() if norms else torch.zeros((), device=self.model.device)

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

    def _trained(self, name: str, tensor: Tensor) -> Tensor:
        """The value to save for a tensor of the checkpoint."""
        masters = dict(zip(self.weights, self.masters, strict=True))
        if name in masters:
            return masters[name].detach().to("cpu", tensor.dtype)
        if self.lora and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            module: Any = self.model.get_submodule(name.removesuffix(".weight"))
            delta: Tensor = module.get_delta_weight("default").detach()
            return (tensor.float() + delta.float().cpu()).to(tensor.dtype)
        return tensor

    def copy_file(self, source: Path, target: Path) -> None:
        """Copies a file of the checkpoint; tuned weights take their place in files of tensors."""
        if source.suffix == ".safetensors" and self.weights:
            with safe_open(source, framework="pt") as file:
                tensors = {n: self._trained(n, file.get_tensor(n)).contiguous() for n in file.keys()}  # noqa: SIM118
                save_file(tensors, target, metadata=file.metadata())
            shutil.copymode(source, target)
        else:
            shutil.copyfile(source, target)
