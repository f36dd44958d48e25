"""A run of lococo-fit: fusion heads trained beside a frozen model, with states to resume from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lococo_runtime import CorruptError, LococoError, NotFoundError
from lococo_runtime._exceptions import ConfigError, TargetExistsError, UnsupportedError
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import publish_directory, sha256_file, storage_error
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from lococo_export.checkpoints import (
    HEADS_CONFIG_NAME,
    HEADS_NAME,
    Checkpoint,
    HeadWeights,
    load_checkpoint,
    save_heads,
)
from lococo_export.reference import DecoderLayer, ReferenceModel

from .blocks import FullCache, Policy
from .card import CARD_NAME, model_card
from .data import Corpus, Window, batch_windows, load_corpus
from .evaluate import choose_windows, window_nll
from .heads import TrainableHead, TunedWeights, initial_heads
from .losses import GraphedBatch, Losses, StepLosses
from .settings import (
    DTYPES,
    NOT_COMPARED,
    FitSettings,
    TrainingPlan,
    check_plans,
    choose_device,
    memory_advice,
    training_plan,
)
from .workers import Workers

STATE_NAME = "state.pt"
LOG_NAME = "log.jsonl"
RECORD_NAME = "lococo_fit.json"
STATE_VERSION = 2
SHAPES = ("mem_size", "hh_keep_rate", "kernel_size", "num_conv_layers", "conv_expand", "tune", "lora", "model")
"""What a state to begin with has to share."""
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt", "*.jinja", "LICENSE*")


class DivergedError(LococoError):
    """The loss or a gradient became NaN or infinite."""


class Fit:
    """A run: everything it needs, loaded and checked.

    Args:
        resume: go on from the state in OUTPUT.fit.
        force: replace OUTPUT, and a state that is not resumed.
        progress: draw a bar on stderr instead of showing a line every few steps.
        show: receives lines for people.

    Attributes:
        output: where the heads go; a path.
        folder: of the state that a run goes on from, `output` and ".fit".
        workers: the processes.
        model: in PyTorch.
        heads: what is fitted, one module a layer.
        tuned: what is fitted beside them.
        windows: of the text, those that steps draw from.
        losses: of a batch.
        step: how many are done.
        held_out: perplexities on text that is not fitted to, of "full" and "lococo"; empty before the first.

    Raises:
        LococoError: whatever is wrong with model, text or settings, before anything is computed.
    """

    def __init__(
        self,
        settings: FitSettings,
        *,
        resume: bool = False,
        force: bool = False,
        progress: bool = False,
        show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.settings, self.force, self.show = settings, force, show
        self._shows_bar = progress
        self.output = Path(settings.output).absolute()
        self.folder = self.output.with_name(self.output.name + ".fit")
        self.workers = Workers(settings.device)
        if not self.workers.first:
            self.show = lambda line: None
        self._check_targets(resume)
        cache = settings.cache
        check_plans(settings)
        device = choose_device(self.workers.device(settings.device))
        if settings.cuda_graphs and device.type != "cuda":
            raise UnsupportedError(f"cuda_graphs: expected a CUDA GPU, but the run is on {device}")
        name = settings.dtype if settings.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
        base = load_checkpoint(
            settings.model, policy="h2o", mem_size=cache.mem_size, block_size=cache.block_size, buffer=cache.buffer
        )
        if base.format == "lococo-merged":
            raise ConfigError(f"{settings.model}: has fusion heads among its tensors; fit heads for the plain model")
        window = base.sliding_window
        if window and settings.context > window and (settings.reconstruction_weight or settings.distill_weight):
            raise ConfigError(
                f"context={settings.context}: the model looks back {window} tokens (sliding_window), so a full cache is"
                f" no teacher beyond; expected --context {window} or less, or --reconstruction-weight 0"
                " --distill-weight 0 --lm-weight 1"
            )
        plain = base
        self._rope_scaling: dict[str, Any] = {}  # what config.json is to say of it
        if settings.lora or settings.positions:
            base, self._rope_scaling = _scale_rope(base, settings)
        self._base = base
        with self.workers.first_goes_first():
            self._corpus, self._train_documents, self._held_out_documents = _load_text(settings, base)
        self.windows = self._corpus.windows(settings.context, self._train_documents)
        self._fingerprint = {"text": self._corpus.key, "model": _model_digest(base)}
        self.model = ReferenceModel(base, DTYPES[name], device)
        torch.backends.cudnn.deterministic = True  # the gradient of a convolution; a seed is to repeat a run
        self.heads = nn.ModuleList(TrainableHead(h, self.model.dtype) for h in self._start()).to(device)
        self.tuned = TunedWeights(self.model, settings.tune, settings.lora, settings.lora_alpha, settings.seed)
        changes = bool(self.tuned.masters or self._rope_scaling)
        teacher = ReferenceModel(plain, DTYPES[name], device) if changes and settings.distill_weight else None
        self.losses = Losses(self.model, self.heads, settings, teacher)
        self._graphs: dict[str, GraphedBatch] = {}  # by regime
        self._board: Any = None
        if settings.fusion_activation == "none":
            # it cancels in the softmax: its gradient is rounding, which Adam would blow up to full steps
            for head in self.heads:
                cast(TrainableHead, head).biases[-1].requires_grad_(False)
        convs = [p for n, p in self.heads.named_parameters() if p.requires_grad and not n.endswith("normalizer")]
        normalizers = [p for n, p in self.heads.named_parameters() if n.endswith("normalizer")]
        groups = [
            {"params": convs, "base_lr": settings.lr},
            {"params": normalizers, "base_lr": settings.normalizer_lr, "weight_decay": 0.0},
        ]
        if self.tuned.masters:
            groups.append({"params": self.tuned.masters, "base_lr": settings.tune_lr, "weight_decay": 0.0})
        # a gradient of a relative error over 10 million weights is small: a large eps would swallow it
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, eps=1e-12)
        self.step = 0
        self.held_out: dict[str, float] = {}
        if resume:
            self._load_state()
        elif self._other_run is not None:
            self._begin_with(self._other_run)

    def _check_targets(self, resume: bool) -> None:
        state = self.folder / STATE_NAME
        if self.output.exists() and not self.force:
            raise TargetExistsError(f"{self.output}: already exists; pass --force to replace it, or choose another")
        if resume and not state.exists():
            raise NotFoundError(f"{state}: nothing to resume; leave --resume out")
        if state.exists() and not resume and not self.force:
            raise TargetExistsError(f"{state}: an unfinished run; pass --resume to go on, or --force to start anew")

    @property
    def _other_run(self) -> Path | None:
        """The state that `init_from` is the folder of; None if it names a checkpoint, or nothing."""
        path = Path(self.settings.init_from) / STATE_NAME
        return path if self.settings.init_from and path.is_file() else None

    def _start(self) -> tuple[HeadWeights, ...]:
        s, cache = self.settings, self.settings.cache
        if not s.init_from or self._other_run is not None:
            return initial_heads(self._base.geometry, cache, seed=s.seed, std=s.init_std, normalizer=s.init_normalizer)
        start = load_checkpoint(s.init_from)
        free = {"block_size", "buffer", "local_len", "activation", "score_decay", "decay_per"}
        ours, theirs = dataclasses.asdict(cache), dataclasses.asdict(start.config)
        wrong = [
            f"{k}: expected {ours[k]!r}, got {theirs[k]!r}" for k in ours if k not in free and ours[k] != theirs[k]
        ]
        if wrong or start.geometry != self._base.geometry:
            raise ConfigError(f"{s.init_from}: heads of another shape: {'; '.join(wrong) or 'another model'}")
        return start.heads

    # --- training ---------------------------------------------------------------------------------------------------

    def ids(self, windows: list[Window]) -> Tensor:
        """Tokens (B, context) on the device."""
        return torch.from_numpy(self._corpus.read(windows, self.settings.context)).to(self.model.device)

    def _batches(self, step: int) -> Iterator[Tensor]:
        """What this process reads in a step, `accumulate` times (B, context)."""
        s = self.settings
        for i in range(s.accumulate):
            index = (step * s.accumulate + i) * self.workers.count + self.workers.rank
            yield self.ids(batch_windows(self.windows, s.batch, index, s.seed))

    def gradients(self, step: int) -> tuple[StepLosses, TrainingPlan]:
        """The losses of a step, their gradients in the heads."""
        s = self.settings
        plan = training_plan(s, step)
        always_alike = plan.regime == "block" or s.decode_blocks
        if s.cuda_graphs and always_alike and self.model.device.type == "cuda" and plan.regime not in self._graphs:
            ids = self.ids(self.windows[:1] * s.batch)
            self._graphs[plan.regime] = GraphedBatch(self.losses, plan, ids, 1 / s.accumulate)
        self._optimizer.zero_grad(set_to_none=not s.cuda_graphs)  # a graph writes where gradients were
        self.tuned.zero_grad()
        losses = self.losses.new()
        for ids in self._batches(step):
            if plan.regime in self._graphs:
                self._graphs[plan.regime].backward(ids, losses)
            else:
                self.losses.backward(ids, plan, 1 / s.accumulate, losses)
        self.tuned.gather()
        gradients = [p.grad for p in [*self.heads.parameters(), *self.tuned.masters] if p.grad is not None]
        self.workers.mean([losses.layers, losses.lm, losses.distill, *gradients])
        return losses, plan

    def lr_factor(self, step: int) -> float:
        """What learning rates are multiplied with at a step."""
        s = self.settings
        warm = min(1.0, (step + 1) / (s.warmup + 1))
        if s.schedule == "constant":
            return warm
        return warm * (0.1 + 0.9 * (1 + math.cos(math.pi * step / s.steps)) / 2)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step: its entry in the log.

        Raises:
            DivergedError: a loss or a gradient is not finite; the heads are as they were.
        """
        s = self.settings
        losses, plan = self.gradients(self.step)
        norms = torch.stack(
            [torch.stack([p.grad.norm() for p in h.parameters() if p.grad is not None]).norm() for h in self.heads]
        )  # (layers,)
        # one wait for the device a step
        tuned = self.tuned.gradient_norm()
        table = torch.cat([losses.layers, norms, torch.stack([tuned, losses.lm, losses.distill])]).cpu()
        layers, norms_cpu = table[: len(norms)], table[len(norms) : 2 * len(norms)]
        if not torch.isfinite(table).all():
            bad = [i for i in range(len(norms)) if not torch.isfinite(layers[i] + norms_cpu[i])]
            which = f"layer(s) {', '.join(map(str, bad))}" if bad else "weights of the model"
            if s.through_model and (first := self._first_bad_layer(plan)) is not None:
                which = f"layer(s) {first}, where it began"
            kept = self.folder / STATE_NAME
            good = (
                f"the last good state is {kept}: begin anew with its heads by --init-from {self.folder}"
                if kept.exists()
                else "no state was saved yet"
            )
            raise DivergedError(
                f"step {self.step}: loss or gradient is not finite in {which}; {good}; lower --lr, or look at the text"
                " of this step"
            )
        for h, norm in zip(self.heads, norms_cpu.tolist(), strict=True):
            if s.clip and norm > s.clip:
                for p in h.parameters():
                    if p.grad is not None:
                        p.grad.mul_(s.clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.lr_factor(self.step)
        self._optimizer.step()
        with torch.no_grad():
            for head in self.heads:
                # beyond, a fusion extrapolates: over hundreds of fusions, mixed slots grow without bound
                cast(TrainableHead, head).normalizer.clamp_(0, 1)
        self.tuned.scatter()
        self.step += 1
        entry: dict[str, Any] = {"step": self.step, "regime": plan.regime}
        total = 0.0
        if s.reconstruction_weight:
            entry |= {"reconstruction": float(layers.mean()), "layers": layers.tolist()}
            total += s.reconstruction_weight * entry["reconstruction"]
        if s.through_model:
            lm, distill = float(table[-2]), float(table[-1])
            entry |= {"lm": lm, "perplexity": math.exp(min(lm, 700.0)), "distill": distill}
            total += s.lm_weight * lm + s.distill_weight * distill
        return {**entry, "loss": total, "tokens": s.batch * s.accumulate * self.workers.count * plan.tokens}

    def _first_bad_layer(self, plan: TrainingPlan) -> int | None:
        """The layer that is the first to compute something that is not finite; gradients carry it to all of them."""
        found: list[int] = []

        def watch(i: int, module: nn.Module) -> RemovableHandle:
            def look(_module: Any, _inputs: Any, output: Tensor) -> None:
                if not torch.isfinite(output).all():
                    found.append(i)

            return module.register_forward_hook(look)

        blocks = [cast(DecoderLayer, block) for block in self.model.model.layers]
        handles = [watch(i, m) for i, block in enumerate(blocks) for m in (block.self_attn.o_proj, block.mlp)]
        try:
            for ids in self._batches(self.step):
                self.losses.backward(ids, plan, 1.0, self.losses.new())
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def evaluate(self) -> dict[str, float]:
        """Held-out perplexities of the second half of windows: "full" (computed once), "lococo" reading blocks, and
        after the last step "lococo_step", reading tokens one by one."""
        s = self.settings
        chosen = choose_windows(self._corpus, s.context, s.eval_windows, self._held_out_documents)
        ids = self._corpus.read(chosen, s.context)
        wanted: list[tuple[str, Policy, int | None]] = [("lococo", self.losses.policy, None)]
        if "full" not in self.held_out:
            wanted.append(("full", FullCache(), None))
        if self.step == s.steps:
            wanted.append(("lococo_step", self.losses.policy, s.block_size))
        for name, policy, step_from in wanted:
            nll = window_nll(self.model, policy, ids, block_size=s.block_size, step_from=step_from, batch=s.batch)
            self.held_out[name] = math.exp(float(nll[:, s.context // 2 - 1 :].mean()))
        return dict(self.held_out)

    def measure(self) -> dict[str, float]:
        """Seconds of a step of either regime that is still to come; changes nothing."""
        s = self.settings
        regimes = {training_plan(s, step).regime: step for step in range(self.step, s.steps)}
        seconds = {}
        for regime, step in regimes.items():
            for _ in range(2):  # the first one warms up
                self._synchronize()
                start = time.perf_counter()
                self.gradients(step)
                self._synchronize()
                seconds[regime] = time.perf_counter() - start
        self._optimizer.zero_grad(set_to_none=not s.cuda_graphs)
        return seconds

    def estimate(self) -> str:
        """Measures steps of either regime and says what the whole run will take."""
        s = self.settings
        regimes = [training_plan(s, step).regime for step in range(self.step, s.steps)]
        seconds = self.measure()
        total = sum(seconds[regime] for regime in regimes)
        trained = sum(p.numel() for group in self._optimizer.param_groups for p in group["params"])
        if self.model.device.type == "cuda":
            memory, where = torch.cuda.max_memory_allocated(self.model.device), "on the GPU"
        else:
            memory, where = memory_bytes("VmHWM"), "of the process"
        return (
            f"estimate: {len(regimes):,} steps, about {total / 60:,.1f} min (measured:"
            f" {', '.join(f'{t:.2f} s a {regime} step' for regime, t in seconds.items())}; evaluation and saving not"
            f" counted); peak memory"
            f" {memory / 2**30:.2f} GiB {where}, and {2 * 4 * trained / 2**30:.2f} GiB for the optimizer"
        )

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def run(self, *, estimate_only: bool = False) -> Path:
        """Trains to the last step and writes the checkpoint; returns its directory.

        Raises:
            DivergedError: see `train_step`.
            OutOfMemoryError: what to lower.
            StorageError, NoSpaceError: a state or the checkpoint cannot be written.
        """
        s = self.settings
        # softmax gradients are full of denormals, which made the convolutions' backward pass 10 times slower on a CPU
        torch.set_flush_denormal(self.model.device.type == "cpu")
        try:
            with memory_advice(self._what_to_lower):
                self._describe()
                if self.step < s.steps:
                    self.show(self.estimate())
                if not estimate_only:
                    self._train()
                    if self.workers.first:
                        self.publish()
                    self.workers.wait()
        finally:
            torch.set_flush_denormal(False)
        return self.output

    def _what_to_lower(self) -> str:
        s = self.settings
        return (
            f"out of memory on {self.model.device} at step {self.step}: lower --batch (now {s.batch}; raise"
            f" --accumulate to make up for it), --context (now {s.context}), --bptt (now {s.bptt}) or"
            f" --layers-at-once (now {s.layers_at_once})"
            + ("; or pass --checkpointing" if s.through_model and not s.checkpointing else "")
        )

    def _describe(self) -> None:
        s, g = self.settings, self._base.geometry
        parameters = sum(p.numel() for p in self.heads.parameters())
        for note in self._corpus.notes:
            self.show(f"note: {note}")
        self.show(
            f"{g.family}, {g.num_layers} layers, {parameters:,} head parameters; {len(self.windows):,} windows"
            f" of {s.context:,} tokens from {len(self._train_documents):,} documents, {len(self._held_out_documents):,}"
            f" documents held out; {self.model.dtype} on {self.model.device}"
        )

    def _train(self) -> None:
        s = self.settings
        if self.workers.first:
            self._open_log()
        if s.eval_every and self.step == 0:
            self._show_held_out()
        since = time.perf_counter()
        entries: list[dict[str, Any]] = []  # since the last progress line
        shown = self._shows_bar and self.workers.first
        bar = tqdm(total=s.steps, initial=self.step, desc="fitting", unit="step", disable=not shown)
        while self.step < s.steps:
            entries.append(self.train_step())
            self._log(entries[-1])
            ppl = entries[-1].get("perplexity", self.held_out.get("lococo"))
            bar.set_postfix({"loss": f"{entries[-1]['loss']:.5f}"} | ({"perplexity": f"{ppl:.3f}"} if ppl else {}))
            bar.update()
            held_out = s.eval_every and (self.step % s.eval_every == 0 or self.step == s.steps)
            if held_out or self.step % s.log_every == 0 or self.step == s.steps:
                if not shown:
                    self._show_progress(entries, time.perf_counter() - since)
                if held_out:
                    self._show_held_out()
                entries, since = [], time.perf_counter()
            if self.workers.first and (self.step % s.save_every == 0 or self.step == s.steps):
                self.save_state()
        bar.close()
        if self._board is not None:
            self._board.close()

    def _show_progress(self, entries: list[dict[str, Any]], seconds: float) -> None:
        parts = [f"step {self.step}/{self.settings.steps}"]
        for regime in ("block", "step"):
            chosen = [e for e in entries if e["regime"] == regime]
            if chosen:
                ppl = f" (perplexity {chosen[-1]['perplexity']:.3f})" if "perplexity" in chosen[-1] else ""
                parts.append(f"{regime} loss {sum(e['loss'] for e in chosen) / len(chosen):.5f}{ppl}")
        parts.append(f"{sum(e['tokens'] for e in entries) / seconds:,.0f} tokens/s")
        parts.append(f"{seconds / len(entries) * (self.settings.steps - self.step) / 60:.1f} min left")
        self.show("  ".join(parts))

    def _show_held_out(self) -> None:
        if not self.workers.first:
            return
        found = self.evaluate()
        self._log({"step": self.step, "held_out": found})
        stepwise = f", token by token {found['lococo_step']:.3f}" if "lococo_step" in found else ""
        with tqdm.external_write_mode(file=sys.stderr):  # a bar makes way for the line
            self.show(
                f"step {self.step}  held-out perplexity {found['lococo']:.3f}{stepwise}"
                f" (full cache {found['full']:.3f}),"
                f" tokens {self.settings.context // 2:,} to {self.settings.context:,}"
            )

    # --- files ------------------------------------------------------------------------------------------------------

    def _open_log(self) -> None:
        """Makes the run's folder; entries after the state that is resumed go."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.folder / LOG_NAME
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() and self.step else []
            kept = []
            for line in lines:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that was being written when the run was killed
                if entry["step"] <= self.step:
                    kept.append(line)
            log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            if self.settings.tensorboard:
                self._board = _tensorboard(self.folder / "tensorboard", self.step)
        except OSError as e:
            raise storage_error(e, self.folder) from e

    def _log(self, entry: dict[str, Any]) -> None:
        if not self.workers.first:
            return
        if self._board is not None:
            for name, value in {**entry, **entry.get("held_out", {})}.items():
                if isinstance(value, float):
                    kind = "held_out" if "held_out" in entry else entry["regime"]
                    self._board.add_scalar(f"{kind}/{name}", value, entry["step"])
        try:
            with (self.folder / LOG_NAME).open("a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            raise storage_error(e, self.folder / LOG_NAME) from e

    def _compared(self) -> dict[str, Any]:
        settings = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in NOT_COMPARED}
        computed = {"dtype": str(self.model.dtype)}  # what auto came to
        computed["processes"] = str(self.workers.count)
        document: dict[str, Any] = json.loads(json.dumps({**settings, **computed, **self._fingerprint}))
        return document

    def save_state(self) -> Path:
        """Writes the state to resume from, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(
            {
                "version": STATE_VERSION,
                "step": self.step,
                "heads": self.heads.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "tuned": [m.detach() for m in self.tuned.masters],
                "held_out": self.held_out,
                "settings": json.dumps(self._compared()),
            },
            buffer,
        )
        path = self.folder / STATE_NAME
        part = path.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as f:
                f.write(buffer.getbuffer())
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise storage_error(e, path) from e
        return path

    def _read_state(self, path: Path, compared: Collection[str], purpose: str) -> dict[str, Any]:
        """A state whose settings are ours, as far as they are compared."""
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            version, stored = state["version"], json.loads(state["settings"])
        except Exception as e:  # whatever a damaged pickle raises
            raise CorruptError(f"{path}: not a state of lococo-fit: {e}; pass --force to start anew") from e
        if version != STATE_VERSION:
            raise CorruptError(
                f"{path}: version: expected {STATE_VERSION}, got {version!r}; pass --force to start anew"
            )
        ours = self._compared()
        wrong = [f"{k}: was {stored.get(k)!r}, now {ours[k]!r}" for k in compared if stored.get(k) != ours[k]]
        if wrong:
            raise ConfigError(f"{path}: cannot {purpose}: {'; '.join(wrong)}")
        return state

    def _begin_with(self, path: Path) -> None:
        """Takes over what another run has trained so far, and nothing else of it."""
        state = self._read_state(path, SHAPES, "begin with it")
        self.heads.load_state_dict(state["heads"])
        self.tuned.load(state["tuned"])

    def _load_state(self) -> None:
        state = self._read_state(self.folder / STATE_NAME, self._compared(), "resume with other settings")
        self.heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.tuned.load(state["tuned"])
        self.step, self.held_out = state["step"], state["held_out"]

    def publish(self) -> None:
        """Writes the checkpoint: the model's files, the heads, and a record of the run."""
        s = self.settings
        skipped = {HEADS_NAME, HEADS_CONFIG_NAME, RECORD_NAME}
        source = self._base.source_dir
        with publish_directory(self.output, force=self.force, marker=HEADS_CONFIG_NAME) as staging:
            for path in sorted({p for pattern in MODEL_FILES for p in source.glob(pattern)}):
                if path.is_file() and path.name not in skipped:
                    self.tuned.copy_file(path, staging / path.name)
            heads = [h.export(DTYPES[s.heads_dtype]) for h in self.heads if isinstance(h, TrainableHead)]
            save_heads(staging, s.cache, tuple(heads))
            shutil.copymode(staging / "config.json", staging / HEADS_NAME)  # safetensors files are private at first
            record = self._record()
            (staging / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if self._rope_scaling:
                _write_rope(staging / "config.json", self._rope_scaling, max(s.context, s.positions))
            (staging / CARD_NAME).write_text(model_card(s, record, source.name), encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        def documents(numbers: list[int]) -> list[dict[str, str]]:
            return [{"name": self._corpus.names[d], "sha256": self._corpus.digests[d]} for d in numbers]

        return {
            "settings": self._compared(),
            "steps": self.step,
            "processes": self.workers.count,
            "held_out_perplexity": self.held_out,
            "normalizers": [float(h.normalizer.detach()) for h in self.heads if isinstance(h, TrainableHead)],
            "trained_on": documents(self._train_documents),
            "held_out": documents(self._held_out_documents),
            "torch": torch.__version__,
        }


def _load_text(settings: FitSettings, base: Checkpoint) -> tuple[Corpus, list[int], list[int]]:
    corpus = load_corpus(
        settings.text,
        base.source_dir,
        base.geometry.vocab_size,
        text_field=settings.text_field,
        skip_undecodable=settings.skip_undecodable,
        cache_dir=Path(settings.cache_dir),
    )
    corpus.windows(settings.context)  # refuses text shorter than one window, before a split can
    return corpus, *corpus.split(settings.context, settings.held_out, settings.seed)


def _model_digest(checkpoint: Checkpoint) -> str:
    files = sorted({checkpoint.tensors.file(name) for name in checkpoint.tensors})
    return "-".join(sha256_file(f)[:16] for f in [checkpoint.source_dir / "config.json", *files])


def _scale_rope(base: Checkpoint, settings: FitSettings) -> tuple[Checkpoint, dict[str, Any]]:
    """The model with RoPE scaled to more positions than it was trained on, and config.json's word for it.

    Linear: every position divided by the factor (arXiv 2306.15595). YaRN (arXiv 2309.00071): only channels that do not
    complete a turn within the trained positions; its temperature stays 1, as a query sees no more columns than before.
    """
    path = base.source_dir / "config.json"
    limit = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    wanted = max(settings.context, settings.positions)
    if not limit or wanted <= limit:
        return base, {}
    rope = base.geometry.rope
    if rope["type"] != "default":
        raise UnsupportedError(
            f"{path}: {wanted} positions, above {limit}, scale RoPE, but it is {rope['type']} already"
        )
    if settings.context > limit and (settings.distill_weight or settings.reconstruction_weight):
        raise ConfigError(
            f"context={settings.context}: the model was trained to {limit} positions, so its full cache is no teacher"
            " beyond; expected --reconstruction-weight 0 --distill-weight 0 --lm-weight 1"
        )
    scaling: dict[str, Any] = {"rope_type": settings.rope_scaling, "factor": wanted / limit}
    if settings.rope_scaling == "yarn":
        scaling |= {"original_max_position_embeddings": limit, "attention_factor": 1.0}
    named = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
    return dataclasses.replace(base, geometry=dataclasses.replace(base.geometry, rope=rope | named)), scaling


def _write_rope(path: Path, scaling: dict[str, Any], positions: int) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("rope_parameters"):
        config["rope_parameters"] = {**config["rope_parameters"], **scaling}
    config |= {"rope_scaling": scaling, "max_position_embeddings": positions}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as e:
        raise UnsupportedError("--tensorboard needs tensorboard: pip install 'lococo-export[fit-all]'") from e
    return SummaryWriter(folder, purge_step=step + 1)
