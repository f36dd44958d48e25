"""What a run of lococo-fit computes: its settings, and the plan of every step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lococo_runtime import LococoError
from lococo_runtime._exceptions import ConfigError, OutOfMemoryError, UnsupportedError
from lococo_runtime.bundle import LococoConfig

from .blocks import Forward, plan_forwards
from .data import DEFAULT_CACHE

TUNABLE = ("norms", "embeddings")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FitSettings:
    """Everything that decides what a run computes. Flags and the keys of a configuration file have these names;
    `lococo-fit --help` says what each is.

    Raises:
        ConfigError: naming the field, what was expected and what was given.
    """

    model: str = _option("", "Hugging Face model directory with tokenizer.json")
    text: tuple[str, ...] = _option((), "files or directories: text, .jsonl, .parquet, saved datasets")
    output: str = _option("", "checkpoint to make; the run's own files go to OUTPUT.fit")

    mem_size: int = _option(256, "M, slots left by a fusion")
    hh_keep_rate: float = _option(0.5, "share of slots kept verbatim")
    local_len: int = _option(64, "most recent slots always kept, a part of those kept verbatim")
    block_size: int = _option(512, "tokens of one forward")
    buffer: int = _option(16, "slots above M before a fusion fires")
    kernel_size: int = _option(21, "width of the convolutions")
    num_conv_layers: int = _option(1, "convolutions of a head")
    conv_expand: int = _option(1, "channels of inner convolutions, as a multiple of the mixed slots")
    fusion_activation: str = _option("none", "after every convolution: none, relu, silu, gelu, tanh")
    score_decay: float = _option(0.0, "0: scores of the last forward; up to 1: accumulated with this decay")
    decay_per: str = _option("forward", "scores decay with every forward, or with every token")

    reconstruction_weight: float = _option(1.0, "of the layers' attention outputs against the full cache")
    lm_weight: float = _option(0.0, "of the next-token loss, through the whole model")
    distill_weight: float = _option(0.0, "of the divergence from the full cache's logits, through the whole model")
    tune: tuple[str, ...] = _option((), "weights of the model to tune beside the heads: norms, embeddings")
    tune_lr: float = _option(5e-5, "learning rate of those, and of LoRA")
    lora: int = _option(0, "rank of LoRA on q, k, v, o, merged when saved; 0: none. A longer context scales RoPE")
    lora_alpha: float = _option(16.0, "LoRA's scale is this over its rank")
    positions: int = _option(0, "scale RoPE to so many positions, more than a window has; 0: to the context, with LoRA")
    rope_scaling: str = _option("linear", "how: linear, yarn")
    bptt: int = _option(2, "fusions that a gradient crosses")
    decode_share: float = _option(0.25, "share of steps that fit token-by-token decoding, the others fit blocks")
    decode_fusions: int = _option(8, "fusions of such a step")
    decode_blocks: int = _option(0, "blocks that such a step reads before; 0: a random number")

    context: int = _option(4096, "tokens of a window")
    batch: int = _option(8, "windows read at once")
    accumulate: int = _option(1, "batches of one step")
    steps: int = _option(1000, "optimizer steps")
    lr: float = _option(2e-2, "learning rate of the convolutions")
    normalizer_lr: float = _option(2e-2, "learning rate of the normalizers")
    schedule: str = _option("cosine", "constant, or cosine down to a tenth")
    warmup: int = _option(20, "steps of linear warm-up")
    weight_decay: float = _option(0.0, "of AdamW")
    clip: float = _option(1.0, "largest norm of a layer's gradient; 0 clips nothing")
    seed: int = _option(0, "of initial heads, order and split; repeats a run")
    held_out: float = _option(0.1, "share of documents kept for evaluation")
    init_std: float = _option(0.3, "standard deviation of initial convolution weights")
    init_normalizer: float = _option(0.05, "initial normalizers: 0 copies, 1 mixes")
    init_from: str = _option("", "checkpoint whose heads to begin with, or the folder OUTPUT.fit of a run")

    dtype: str = _option("auto", "of model and cache: fp32, bf16; auto is bf16 on a GPU, else fp32")
    device: str = _option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one")
    layers_at_once: int = _option(10, "layers that reconstruction fits side by side: fewer need less memory")
    cuda_graphs: bool = _option(
        False, "replay steps as CUDA graphs, block steps and those of --decode-blocks: faster, where batches are small"
    )
    checkpointing: bool = _option(False, "compute layers again in the backward pass (lm and distill losses)")
    heads_dtype: str = _option("fp32", "in which heads are saved: fp32, bf16, fp16")
    tensorboard: bool = _option(False, "write the log for TensorBoard too, to OUTPUT.fit/tensorboard")
    log_every: int = _option(10, "steps between progress lines")
    eval_every: int = _option(100, "steps between held-out perplexities; 0 never")
    eval_windows: int = _option(8, "windows of a held-out perplexity")
    save_every: int = _option(50, "steps between states to resume from")
    text_field: str = _option("text", "of JSONL objects and table columns")
    skip_undecodable: bool = _option(False, "leave out files that are not UTF-8 text")
    cache_dir: str = _option(str(DEFAULT_CACHE), "where tokenised text is kept")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, float) and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif isinstance(f.default, tuple):
                if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
                    raise ConfigError(f"{f.name}: expected a list of strings, got {value!r}")
                object.__setattr__(self, f.name, tuple(value))  # TOML has no tuples
            elif type(value) is not type(f.default):
                raise ConfigError(f"{f.name}: expected {type(f.default).__name__}, got {value!r}")
        for name in ("model", "text", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected --{name} on the command line or in the configuration file")
        for name in ("bptt", "context", "batch", "accumulate", "steps", "log_every", "save_every", "eval_windows",
                     "layers_at_once",
                     "decode_fusions"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("reconstruction_weight", "lm_weight", "distill_weight", "lr", "normalizer_lr", "tune_lr", "warmup",
                     "clip", "weight_decay", "eval_every", "seed", "init_std", "lora", "lora_alpha", "positions",
                     "decode_blocks"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed: expected less than 2^63, got {self.seed}")
        for name in ("decode_share", "held_out", "init_normalizer"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if not self.reconstruction_weight and not self.through_model:
            raise ConfigError("lm_weight, distill_weight, reconstruction_weight: expected one above 0, all are 0")
        for name, allowed in (
            ("schedule", ("constant", "cosine")),
            ("rope_scaling", ("linear", "yarn")),
            ("dtype", ("auto", "fp32", "bf16")),  # gradients in fp16 would need scaling
            ("heads_dtype", tuple(DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        object.__setattr__(self, "tune", tuple(x for group in self.tune for x in group.split(",")))
        if set(self.tune) - set(TUNABLE):
            raise ConfigError(f"tune: expected some of {', '.join(TUNABLE)}, got {', '.join(self.tune)}")
        if (self.tune or self.lora) and not self.through_model:
            raise ConfigError(
                "tune, lora: reconstruction has no gradient for weights of the model; expected --lm-weight or"
                " --distill-weight above 0"
            )
        if self.checkpointing and not self.through_model:
            raise ConfigError(
                "checkpointing: reconstruction goes through one layer at a time, so there is nothing to compute again;"
                " expected --lm-weight or --distill-weight above 0, or a lower --layers-at-once to need less memory"
            )
        if self.eval_every and not self.held_out:
            raise ConfigError("held_out: expected more than 0 for held-out perplexities; or pass --eval-every 0")

    @property
    def through_model(self) -> bool:
        """Gradients go through the whole model, not only through single layers."""
        return bool(self.lm_weight or self.distill_weight)

    @property
    def cache(self) -> LococoConfig:
        """The slot cache to fit heads for."""
        return LococoConfig.from_rate(
            self.mem_size,
            self.hh_keep_rate,
            self.block_size,
            local_len=self.local_len,
            buffer=self.buffer,
            kernel_size=self.kernel_size,
            num_conv_layers=self.num_conv_layers,
            conv_expand=self.conv_expand,
            activation=self.fusion_activation,
            score_decay=self.score_decay,
            decay_per=self.decay_per,
        )


NOT_COMPARED = (
    "model", "text", "output", "cache_dir", "init_from", "device", "log_every", "eval_every", "eval_windows",
    "save_every", "heads_dtype", "layers_at_once", "cuda_graphs", "tensorboard",
)  # fmt: skip
"""Settings that a resumed run may change; what lies behind the paths is compared by its contents."""


@contextlib.contextmanager
def memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemoryError with `advice` where a device or the machine has no memory left."""
    try:
        yield
    except LococoError:  # says what to do already
        raise
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):
            raise OutOfMemoryError(advice()) from e
        raise


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU if there is one.

    Raises:
        UnsupportedError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UnsupportedError(f"device: {name!r} is not available here: {str(e).splitlines()[0]}") from e
    return torch.device(name)


# --- what a step reads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPlan:
    """Forwards over one batch; fusions after forwards that start at `trains_from` or later are trained."""

    forwards: list[Forward]
    trains_from: int

    def trains(self, forward: Forward) -> bool:
        """The fusion after this forward is trained."""
        return forward.fuses and forward.start >= self.trains_from and forward is not self.forwards[-1]

    @property
    def regime(self) -> str:
        """One of "block" and "step"."""
        return "step" if self.forwards[-1].stepwise else "block"

    @property
    def tokens(self) -> int:
        return self.forwards[-1].stop

    @property
    def first_scored(self) -> int:
        """The first token that sees the outcome of a trained fusion."""
        return next((f.stop for f in self.forwards if self.trains(f)), self.tokens)

    @property
    def scored_tokens(self) -> int:
        """Tokens that see the outcome of a trained fusion."""
        return self.tokens - self.first_scored


def most_decode_blocks(settings: FitSettings) -> int:
    """Blocks that a window holds before the fusions of a step that fits decoding."""
    cache = settings.cache
    needed = cache.capacity + 1 + settings.decode_fusions * (cache.buffer + 1)
    return max(0, settings.context - needed) // cache.block_size


def training_plan(settings: FitSettings, step: int) -> TrainingPlan:
    """What step number `step` reads of its windows: blocks to the end; or, for a share of the steps, a random number of
    blocks and then tokens as decoding reads them."""
    cache, context = settings.cache, settings.context
    rng = np.random.default_rng([settings.seed, step])
    if rng.random() >= settings.decode_share:
        return TrainingPlan(plan_forwards(context, cache.block_size, cache.capacity, cache.mem_size), 0)
    most = most_decode_blocks(settings)
    blocks = settings.decode_blocks or int(rng.integers(min(1, most), most + 1))
    start = blocks * cache.block_size
    plan = plan_forwards(context, cache.block_size, cache.capacity, cache.mem_size, step_from=start)
    steps = [f for f in plan if f.stepwise][: settings.decode_fusions + 1]
    return TrainingPlan([f for f in plan if not f.stepwise] + steps, start)


def check_plans(settings: FitSettings) -> None:
    """Raises ConfigError if a window never sees a fusion of either regime, or has no room for what was asked."""
    most = most_decode_blocks(settings)
    if settings.decode_share and settings.decode_blocks > most:
        raise ConfigError(
            f"decode_blocks: expected at most {most}, got {settings.decode_blocks}: a window of {settings.context}"
            f" tokens also holds decode_fusions={settings.decode_fusions}; raise --context, or lower one of them"
        )
    for regime, share in (("blocks", 0.0), ("decoding", 1.0)):
        if (regime == "blocks" and settings.decode_share == 1) or (regime == "decoding" and not settings.decode_share):
            continue
        plan = training_plan(dataclasses.replace(settings, decode_share=share), 0)
        if plan.scored_tokens == 0:
            cache = settings.cache
            raise ConfigError(
                f"context={settings.context}: no fusion is followed by tokens when reading {regime}; expected more than"
                f" M + buffer = {cache.capacity} tokens and another forward (block_size={cache.block_size}); raise"
                " --context, or lower --mem-size or --block-size"
            )
