"""Fit fusion heads by several recipes side by side on one GPU and measure them beside the baselines, in bounded time.

    python scripts/fit_heads.py PLAN.toml --model DIR --corpus DIR --out DIR --budget-seconds 480

A plan has a table of settings of lococo-fit for all jobs, and jobs: `[[job]] name, seconds, stages = [{...}, ...]`.
Each stage fits with its settings from the heads of the stage before, for its `steps`, or else for its share of the
seconds: then steps are counted from a measurement before it, and what came out can be repeated with that number. A job
with a list `sweep` measures selections without fusion, on documents of the training part, so that the choice among them
has not seen the held-out ones. A job with neither measures the fitted checkpoint that `heads` names, and the baselines
of its `mem_sizes`. Every figure is written to the folder of --out as soon as it is there: to a JSON file named after
the job, and the heads to a folder of that name. Jobs use a device one after the other; with --parallel 2 the next one
loads meanwhile. --share lets them use it at once. With --devices 4 they spread over four GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lococo_calibration.blocks import FullCache, Fusion, Policy, ScoreDecay, Slots, Streaming
from lococo_calibration.data import Corpus, load_corpus
from lococo_calibration.evaluate import (
    as_json,
    choose_windows,
    passkey_model,
    passkey_prompts,
    passkey_rows,
    perplexity_rows,
    window_nll,
)
from lococo_calibration.fit import Fit
from lococo_calibration.ruler import RulerPrompt, encode_prompts, make_prompts, read_prompts, ruler_rows, save_prompts
from lococo_calibration.settings import FitSettings, training_plan
from lococo_runtime.bundle import LococoConfig
from lococo_runtime.llm import load_tokenizer
from safetensors.torch import save_file

from lococo_export.checkpoints import Checkpoint, HeadWeights, load_checkpoint
from lococo_export.reference import ReferenceModel, select, take_columns

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

KINDS = ("prose", "code")
PATHS = ("model", "text", "output", "cache_dir", "init_from")
"""Settings of a machine, not of a recipe."""
Texts = dict[str, tuple[npt.NDArray[Any], list[str]]]
"""Of each kind: token ids (N, T), and the document of each window."""


class Record:
    """A job's findings, on disk after every addition."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self.document: dict[str, Any] = {}

    def left(self) -> float:
        return self.deadline - time.time()

    def add(self, key: str, value: Any) -> None:
        if isinstance(value, list):
            self.document.setdefault(key, []).extend(value)
        else:
            self.document[key] = value
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def kind_of(name: str) -> str:
    """Of a training document; "recall" are novels with facts strewn in, which no held-out text has."""
    return "code" if name.endswith(".py") else "recall" if name.startswith("recall_") else "prose"


class Measure:
    """The same windows and prompts for every policy.

    Args:
        validation: windows of the training part instead of held-out ones, each of another document.
    """

    def __init__(
        self, model: ReferenceModel, args: argparse.Namespace, record: Record, *, validation: bool = False
    ) -> None:
        self.model, self.args, self.record = model, args, record
        self._corpus = functools.cache(self._load)  # loading hashes the texts, and every policy asks for them
        self.texts = self._of_training() if validation else self._held_out(args.context, args.windows)

    def _of_training(self) -> Texts:
        args, texts = self.args, {}
        corpus = self._corpus(args.corpus / "train")
        long = np.diff(corpus.offsets) >= 2 * args.context
        for kind in KINDS:
            wanted = [d for d, name in enumerate(corpus.names) if long[d] and kind_of(name) == kind]
            documents = wanted[:: max(1, len(wanted) // args.windows)][: args.windows]
            windows = [(d, int(corpus.offsets[d]) + args.context) for d in documents]
            texts[kind] = corpus.read(windows, args.context), [corpus.names[d] for d in documents]
        return texts

    def _held_out(self, context: int, count: int) -> Texts:
        texts = {}
        for kind in KINDS:
            corpus = self._corpus(self.args.corpus / "held_out" / kind)
            windows = choose_windows(corpus, context, count)
            texts[kind] = corpus.read(windows, context), [corpus.names[d] for d, _ in windows]
        return texts

    def _load(self, folder: Path) -> Corpus:
        size = self.model.geometry.vocab_size
        return load_corpus([folder], self.args.model, size, cache_dir=self.args.out / "tokens")

    def perplexity(
        self, policy: Policy, block: int, regime: str, contexts: list[int], job: str, many: Texts | None = None
    ) -> None:
        """Both kinds of text in one batch; of `many` windows no evicted name decides, and they are recorded apart."""
        texts, longest = many or self.texts, contexts[-1]
        ids = np.concatenate([texts[kind][0][:, :longest] for kind in KINDS])
        since, step_from = time.time(), block if regime == "step" else None
        nll = window_nll(self.model, policy, ids, block_size=block, step_from=step_from, batch=self.args.eval_batch)
        seconds = time.time() - since
        what = {"policy": policy.name, "mem_size": policy.mem_size, "regime": regime, "backend": "pytorch"}
        rows, split = [], len(texts[KINDS[0]][0])
        for kind, part in zip(KINDS, (nll[:split], nll[split:]), strict=True):
            found = as_json(perplexity_rows(part, contexts, texts[kind][1], **what))
            rows += [{"job": job, "kind": kind, "block_size": block, **row} for row in found]
            line = " ".join(f"{row['perplexity']:.3f}" for row in found)
            about = f"{kind}, {len(part)} windows" if many else kind
            print(f"{job} {policy.name} M={policy.mem_size} B={block} {regime} {about}: {line}", flush=True)
        self.record.add("every" if many else "perplexity", rows)
        self.record.add("seconds", [{"what": f"{policy.name} {policy.mem_size} {regime}", "seconds": seconds}])

    def long(self, policy: Policy, block: int, tokens: int, job: str) -> None:
        """Perplexity of every 4,096 tokens of a long stretch of prose."""
        corpus = self._corpus(self.args.corpus / "held_out" / "prose")
        windows = choose_windows(corpus, tokens, 4)
        nll = window_nll(self.model, policy, corpus.read(windows, tokens), block_size=block, batch=len(windows))
        found = [float(np.exp(nll[:, a : a + 4096].mean())) for a in range(0, tokens, 4096)]
        row = {"job": job, "policy": policy.name, "mem_size": policy.mem_size, "tokens": tokens,
               "windows": len(windows), "perplexity": found}  # fmt: skip
        self.record.add("long", [row])
        print(f"{job} {policy.name} M={policy.mem_size} long: {' '.join(f'{x:.2f}' for x in found)}", flush=True)

    def passkey(self, policy: Policy, block: int, context: int, job: str, haystack: str = "filler") -> None:
        """Keys among sentences that repeat, or ("text") in held-out prose."""
        tokenizer = load_tokenizer(Path(self.args.model))
        documents = None
        if haystack == "text":
            corpus = self._corpus(self.args.corpus / "held_out" / "prose")
            windows = choose_windows(corpus, context, self.args.windows)
            documents = [ids.tolist() for ids in corpus.read(windows, context)]
        prompts = passkey_prompts(tokenizer, context, [0.0, 0.25, 0.5, 0.75, 1.0], self.args.trials, 0, documents)
        correct = passkey_model(self.model, policy, prompts, block_size=block, batch=len(prompts))
        what = {"policy": policy.name, "mem_size": policy.mem_size, "backend": "pytorch", "context": context,
                "haystack": haystack}  # fmt: skip
        self.record.add("passkey", [{"job": job, **r} for r in as_json(passkey_rows(prompts, correct, **what))])
        print(f"{job} {policy.name} M={policy.mem_size} key in {haystack} {context}: {sum(correct)}/{len(correct)}",
              flush=True)  # fmt: skip

    def ruler(self, policy: Policy, block: int, context: int, job: str) -> None:
        """RULER's tasks, all their prompts side by side."""
        by_task: dict[str, list[RulerPrompt]] = {}
        for prompt in read_prompts(self.args.ruler_prompts):
            if prompt.context == context:
                by_task.setdefault(prompt.task, []).append(prompt)
        chosen = [p for prompts in by_task.values() for p in prompts[: self.args.ruler_examples]]
        tokenizer, batch = load_tokenizer(Path(self.args.model)), self.args.eval_batch
        since = time.time()
        rows = ruler_rows(self.model, policy, tokenizer, chosen, block_size=block, batch=batch)
        self.record.add("ruler", [{"job": job, **dataclasses.asdict(row)} for row in rows])
        self.record.add("seconds", [{"what": f"{policy.name} {policy.mem_size} ruler", "seconds": time.time() - since}])
        line = " ".join(f"{row.task} {row.score:.2f}" for row in rows)
        print(f"{job} {policy.name} M={policy.mem_size} RULER {context}: {line}", flush=True)

    def all(self, policy: Policy, block: int, job: str) -> None:
        """The quickest first; what no time is left for is left out, and said."""
        a, wanted = self.args, self.record.document["job"]
        longest = wanted.get("context", a.context)
        contexts = [c for c in (2048, 4096, 8192, 16384) if c <= longest] or [longest]
        step_contexts = [c for c in contexts if c <= wanted.get("step_context", a.step_context)] or contexts[:1]
        pieces = [("block", lambda: self.perplexity(policy, block, "block", contexts, job))]
        pieces += [(f"passkey {c}", lambda c=c: self.passkey(policy, block, c, job)) for c in a.passkey]
        pieces += [(f"needle {c}", lambda c=c: self.passkey(policy, block, c, job, "text")) for c in a.needle]
        pieces += [(f"ruler {c}", lambda c=c: self.ruler(policy, block, c, job)) for c in a.ruler]
        if policy.capacity is not None:
            pieces.append(("step", lambda: self.perplexity(policy, block, "step", step_contexts, job)))
        if a.every:
            many = self._held_out(contexts[0], a.every)
            for regime in ("block", "step") if policy.capacity is not None else ("block",):
                pieces.append(("every", lambda r=regime: self.perplexity(policy, block, r, contexts[:1], job, many)))
        if a.long and policy.capacity is not None:
            pieces.append(("long", lambda: self.long(policy, block, a.long, job)))
        for name, piece in pieces:
            if "pieces" in wanted and name.split()[0] not in wanted["pieces"]:
                continue
            if self.record.left() < 5:
                self.record.add("left_out", [f"{policy.name} {policy.mem_size} {name}"])
            else:
                piece()


def fit(job: dict[str, Any], common: dict[str, Any], args: argparse.Namespace, record: Record) -> Fit:
    """Runs the stages of a job; returns the last one's run."""
    heads, run = "", None
    for number, stage in enumerate(job["stages"]):
        stage = dict(stage)
        seconds = job["seconds"] * stage.pop("share", 1 / len(job["stages"]))
        output = args.out / "stages" / f"{job['name']}-{number}"
        given = {
            "model": str(args.model), "text": (str(args.corpus / "train"),), "output": str(output),
            "cache_dir": str(args.out / "tokens"), "eval_every": 0, "held_out": 0.0, "steps": 200, **common,
            **job.get("settings", {}), **stage, "init_from": heads,
        }  # fmt: skip
        if not torch.cuda.is_available():
            given["cuda_graphs"] = False
        run = None  # frees the stage before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        run = Fit(FitSettings(**given), force=True, show=lambda line: print(f"{job['name']}: {line}", flush=True))
        try:
            each = run.measure()
        except RuntimeError as e:
            if not run.settings.cuda_graphs:
                raise
            record.add("no_graph", str(e)[:500])
            print(f"{job['name']}: no CUDA graph: {str(e)[:300]}", flush=True)
            given["cuda_graphs"] = False
            run = Fit(FitSettings(**given), force=True, show=lambda line: None)
            each = run.measure()
        print(f"{job['name']}: {number} begins, {record.left():.0f} s left", flush=True)
        s = run.settings
        steps = stage.get("steps")
        if steps is None:
            mean = sum(each[training_plan(s, k).regime] for k in range(s.steps)) / s.steps
            steps = max(1, int(min(seconds, record.left() - 30) / mean))
        run.settings = run.losses.settings = dataclasses.replace(s, steps=steps)
        since = time.time()
        tokens, shown = 0, since
        while run.step < steps and record.left() > 20:
            entry = run.train_step()
            tokens += entry["tokens"]
            if run.step == 1 or run.step == steps or time.time() - shown > 10:
                shown = time.time()
                keys = ("loss", "reconstruction", "lm", "distill")
                losses = {k: round(entry[k], 5) for k in keys if k in entry}
                print(f"{job['name']}: {number} step {run.step}/{steps} {entry['regime']} {losses}", flush=True)
                record.add("log", [{"stage": number, **{k: v for k, v in entry.items() if k != "layers"}}])
        elapsed = time.time() - since
        record.add("stages", [{
            "settings": {k: v for k, v in given.items() if v != getattr(FitSettings, k, None) and k not in PATHS}
            | {"steps": steps},
            "seconds": elapsed, "tokens_per_second": tokens / elapsed, "seconds_a_step": each,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        }])  # fmt: skip
        if run.step < steps:
            record.add("cut_off", f"stage {number} at step {run.step} of {steps}")
            run.settings = run.losses.settings = dataclasses.replace(run.settings, steps=run.step)
        run.publish()
        heads = str(output)
        print(f"{job['name']}: {number} is saved, {record.left():.0f} s left", flush=True)
    if run is None:
        raise SystemExit(f"{job['name']}: stages: expected at least one")
    for name in ("lococo_heads.safetensors", "lococo_config.json", "lococo_fit.json"):
        target = args.out / job["name"]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(heads) / name, target / name)
    return run


def speed(common: dict[str, Any], args: argparse.Namespace, job: dict[str, Any], record: Record) -> None:
    """Tokens a second and peak memory of the losses, alone on the device."""
    for stage in job["speed"]:
        given = {
            "model": str(args.model), "text": (str(args.corpus / "train"),), "output": str(args.out / "speed"),
            "cache_dir": str(args.out / "tokens"), "eval_every": 0, "held_out": 0.0, **common, **stage,
        }  # fmt: skip
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            run = Fit(FitSettings(**given), force=True, show=lambda line: None)
            run.train_step()
            run.train_step()
            seconds, tokens = [], 0
            for _ in range(job.get("repeat", 5)):
                since = time.perf_counter()
                tokens = run.train_step()["tokens"]  # ends with a wait for the device
                seconds.append(time.perf_counter() - since)
        except (RuntimeError, torch.OutOfMemoryError) as e:
            record.add("speed", [{"settings": stage, "error": str(e)[:500]}])
            print(f"speed {stage}: {str(e)[:300]}", flush=True)
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        row = {"settings": {**common, **stage}, "tokens": tokens, "seconds": seconds, "peak_gib": peak,
               "tokens_per_second": tokens / sorted(seconds)[len(seconds) // 2]}  # fmt: skip
        record.add("speed", [row])
        print(f"speed {stage}: {row['tokens_per_second']:,.0f} tokens/s, {peak:.1f} GiB", flush=True)
        del run


def with_rope(model: Path, target: Path, rope: dict[str, Any]) -> Path:
    """The model's directory with other rotary embeddings in its config.json."""
    target.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config | rope), encoding="utf-8")
    return target


def load_model(checkpoint: Checkpoint) -> ReferenceModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ReferenceModel(checkpoint, torch.bfloat16 if device == "cuda" else torch.float32, device)


def plain_model(args: argparse.Namespace) -> ReferenceModel:
    return load_model(load_checkpoint(str(args.model), policy="h2o", mem_size=256, block_size=512, buffer=16))


def sweep(args: argparse.Namespace, job: dict[str, Any], record: Record) -> None:
    """Selections without fusion, and the baselines, in both regimes."""
    model = plain_model(args)
    block = job.get("block_size", 512)
    context = min(job.get("context", 4096), args.context)
    measure = Measure(model, args, record, validation=True)
    deadline = time.time() + job["seconds"]
    policies: list[Policy] = [FullCache()]
    for m in job["mem_sizes"]:
        policies += [Fusion(LococoConfig.h2o(m, block)), Streaming(model, m)]
        for variant in job["sweep"]:
            variant = dict(variant)
            cache = dataclasses.replace(
                LococoConfig.h2o(m, block), local_len=round(variant.pop("local_share") * m),
                score_decay=variant.pop("score_decay"), decay_per=variant.pop("decay_per", "token"),
            )  # fmt: skip
            if variant:
                policies.append(Studied(cache, rule=ScoreRule(**variant), layers=model.geometry.num_layers))
            else:
                policies.append(Unfused(cache))
    if torch.cuda.is_available():  # replayed forwards of decoding equal launched ones
        for policy in policies[1:3]:
            ids = measure.texts["prose"][0][:2, : block + 600]
            both = [window_nll(model, policy, ids, block_size=block, step_from=block, graphs=g) for g in (False, True)]
            off = float(np.abs(both[0] - both[1]).max())
            record.add("graphs", [{"policy": policy.name, "largest_difference": off}])
            print(f"graphs {policy.name}: differ by at most {off:.2e} nats", flush=True)
    for policy in policies:
        if time.time() > deadline:
            record.add("left_out", [f"{policy.name} {policy.mem_size}"])
            continue
        measure.perplexity(policy, block, "block", [context], job["name"])
        if policy.capacity is not None:
            measure.perplexity(policy, block, "step", [context], job["name"])
    measure = Measure(model, args, record)
    for variant in job.get("long", []):
        policy = Unfused(dataclasses.replace(LococoConfig.h2o(job["mem_sizes"][0], block), **variant))
        measure.long(policy, block, args.long, job["name"])
    record.add("done", True)


def work(plan: dict[str, Any], args: argparse.Namespace) -> None:
    """One job, in its own process."""
    job = next(j for j in plan["job"] if j["name"] == args.job)
    record = Record(args.out / f"{args.job}.json", args.deadline)
    record.add("job", job)
    if any("lora" in stage for stage in job.get("stages", [])):
        importlib.import_module("peft")  # takes seconds, which others can use
    lock = (args.out / f"device{os.environ.get('CUDA_VISIBLE_DEVICES', '')}.lock").open("w")
    if not args.share:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the process ends
        print(f"== {args.job}: has the device, {record.left():.0f} s left", flush=True)
    if torch.cuda.is_available():
        record.add("device", torch.cuda.get_device_name())
    else:
        torch.set_flush_denormal(True)
    common = plan.get("common", {})
    if "speed" in job:
        speed(common, args, job, record)
        return
    if "sweep" in job:
        sweep(args, job, record)
        return
    if "stages" in job:
        run = fit(job, common, args, record)
        torch.cuda.empty_cache()
        record.add("normalizers", [float(torch.as_tensor(h.normalizer).detach()) for h in run.losses.policy.heads])
        cache = run.settings.cache
        model, policies = run.model, []
        policies.append((Fusion(cache, load_heads(args.out / "stages", job, model)), cache.block_size))
    else:
        policies = []
        if "rope" in job:
            args.model = with_rope(args.model, args.out / "stages" / f"{args.job}-model", job["rope"])
        if "heads" in job:
            fitted = load_checkpoint(job["heads"])
            model = load_model(fitted)
            policies += [(Fusion(fitted.config, model.heads), block) for block in job["block_sizes"]]
        else:
            model = plain_model(args)
        for block in job["block_sizes"]:
            if job["mem_sizes"]:
                policies.append((FullCache(), block))
            for m in job["mem_sizes"]:
                if not job.get("unfused_only"):
                    policies += [(Fusion(LococoConfig.h2o(m, block)), block), (Streaming(model, m), block)]
                for variant in job.get("unfused", []):
                    cache = dataclasses.replace(LococoConfig.h2o(m, block), **variant)
                    policies.append((Unfused(cache), block))
                for variant in job.get("verbatim", []):
                    policies.append((Verbatim.of(model, LococoConfig(mem_size=m, block_size=block, **variant)), block))
    measure = Measure(model, args, record)
    for policy, block in policies:
        measure.all(policy, block, args.job)
    if "stages" in job and run.tuned.masters:  # what the tuned model is worth without fusion
        names = [name.replace("base_layer.", "") for name in run.tuned.weights]
        tuned = {n: m.detach().to("cpu", torch.float16) for n, m in zip(names, run.tuned.masters, strict=True)}
        save_file(tuned, args.out / args.job / "tuned.safetensors")
        unfused = dataclasses.replace(
            LococoConfig.h2o(cache.mem_size, cache.block_size), local_len=cache.local_len,
            score_decay=cache.score_decay, decay_per=cache.decay_per,
        )  # fmt: skip
        for policy in (FullCache(), Fusion(LococoConfig.h2o(cache.mem_size, cache.block_size)), Unfused(unfused)):
            for regime in ("block", "step") if policy.capacity else ("block",):
                if record.left() > 5:
                    contexts = [c for c in (2048, 4096) if c <= args.context] or [args.context]
                    measure.perplexity(policy, cache.block_size, regime, contexts, args.job)
    record.add("done", True)


class Unfused(Fusion):
    """H2O's selection with other scores, under a name of its own."""

    @property
    def name(self) -> str:
        return "unfused " + " ".join(f"{k}={getattr(self.cache, k)}" for k in ("local_len", "score_decay", "decay_per"))


class Verbatim(Fusion):
    """Fusions that mix nothing: what mixed slots would be anchored on stands last, as it is."""

    @classmethod
    def of(cls, model: ReferenceModel, cache: LococoConfig) -> Verbatim:
        g, mixed = model.geometry, cache.num_mixed
        weight = torch.zeros(mixed, 2 * g.head_dim, cache.kernel_size, dtype=model.dtype, device=model.device)
        return cls(cache, [HeadWeights(0.0, ((weight, weight[:, 0, 0]),))] * g.num_layers)

    @property
    def name(self) -> str:
        return "verbatim " + " ".join(f"{k}={getattr(self.cache, k)}" for k in ("keep", "local_len", "score_decay"))


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """Other ways to score columns and to select by the scores.

    Attributes:
        accumulate: "sum" or "max" of what queries give.
        group: "sum" or "max" over the query heads that share a key.
        power: of every attention weight.
        value_power: selections multiply by the norm of the value to this power.
        key_distance: selections multiply by 1 - cosine of the key and the mean key, to this power.
        pool, pool_width: "avg" or "max" of neighbours' scores, over so many.
        slope: the share of recent slots changes by this from the first layer to the last, the mean staying.
    """

    accumulate: str = "sum"
    group: str = "sum"
    power: float = 1.0
    value_power: float = 0.0
    key_distance: float = 0.0
    pool: str = ""
    pool_width: int = 5
    slope: float = 0.0


@dataclasses.dataclass(frozen=True)
class RuleDecay(ScoreDecay):
    rule: ScoreRule = ScoreRule()

    def receive(self, weights: torch.Tensor, query_weight: torch.Tensor) -> torch.Tensor:
        weights = weights.pow(self.rule.power) if self.rule.power != 1 else weights
        if self.rule.group == "max":
            weights = weights.amax(2, keepdim=True)  # (R, K, 1, n, S)
        if self.rule.accumulate == "max":
            return (weights.sum(2) * query_weight[:, None, :, None]).amax(2)
        return super().receive(weights, query_weight)

    def add(self, past: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        return torch.maximum(past, received) if self.rule.accumulate == "max" else super().add(past, received)


@dataclasses.dataclass(frozen=True)
class Studied(Fusion):
    """A selection without fusion by another rule."""

    rule: ScoreRule = ScoreRule()
    layers: int = 1

    @property
    def name(self) -> str:
        rule = {k: v for k, v in dataclasses.asdict(self.rule).items() if v != getattr(ScoreRule, k)}
        if "pool" not in rule:
            rule.pop("pool_width", None)
        shown = {"local_len": self.cache.local_len, "score_decay": self.cache.score_decay, **rule}
        return "studied " + " ".join(f"{k}={v}" for k, v in shown.items())

    @property
    def decay(self) -> ScoreDecay:
        return RuleDecay(self.cache.score_decay, self.cache.decay_per == "token", self.rule)

    def compress(self, layer: int, slots: Slots, position: int | torch.Tensor) -> Slots:
        rule, scores = self.rule, slots.scores
        if rule.value_power:
            scores = scores * slots.value.float().norm(dim=-1).pow(rule.value_power)
        if rule.key_distance:
            key = slots.key.float()
            cosine = torch.cosine_similarity(key, key.mean(2, keepdim=True), dim=-1)
            scores = scores * (1 - cosine).clamp(min=1e-3).pow(rule.key_distance)
        if rule.pool:
            pool = {"avg": torch.nn.functional.avg_pool1d, "max": torch.nn.functional.max_pool1d}[rule.pool]
            scores = pool(scores, rule.pool_width, 1, rule.pool_width // 2)
        place = layer / (self.layers - 1) - 0.5 if rule.slope else 0.0  # -0.5 to 0.5
        local = self.cache.local_len + round(self.mem_size * rule.slope * place)
        length = torch.full(scores.shape[:1], scores.shape[2], device=scores.device)
        chosen = select(scores, length, dataclasses.replace(self.cache, local_len=local))
        return Slots(*(take_columns(x, chosen.keep) for x in (slots.key, slots.value, slots.scores)))


def load_heads(stages: Path, job: dict[str, Any], model: ReferenceModel) -> list[Any]:
    """What was saved, as a reader of the checkpoint gets it."""
    checkpoint = load_checkpoint(stages / f"{job['name']}-{len(job['stages']) - 1}")
    return ReferenceModel(checkpoint, model.dtype, model.device).heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("plan", type=Path)
    add("--model", type=Path, required=True)
    add("--corpus", type=Path, required=True, help="folder with train/ and held_out/{prose,code}")
    add("--out", type=Path, required=True)
    add("--budget-seconds", type=float, default=480)
    add("--devices", type=int, default=1, help="GPUs, the first ones")
    add("--parallel", type=int, default=2, help="jobs loaded at once, of a GPU")
    add("--share", action="store_true", help="jobs use the device at once: each is 3 to 5 times as slow")
    add("--jobs", nargs="*", help="only these")
    add("--context", type=int, default=8192, help="tokens of held-out windows")
    add("--step-context", type=int, default=8192, help="tokens of them read one by one")
    add("--long", type=int, default=0, help="tokens of prose to read in one go; 0: none")
    add("--windows", type=int, default=8, help="of either kind of text")
    add("--every", type=int, default=0, help="windows of the shortest context, of either kind; 0: none")
    add("--eval-batch", type=int, default=16)
    add("--passkey", type=int, nargs="*", default=[2048, 4096])
    add("--needle", type=int, nargs="*", default=[], help="contexts of held-out prose to hide a key in")
    add("--trials", type=int, default=8)
    add("--ruler", type=int, nargs="*", default=[], help="contexts of RULER's tasks")
    add("--ruler-examples", type=int, default=20, help="of every task and context")
    add("--ruler-prompts", type=Path, help="file of them, made with lm-eval if it is not there (CORPUS/ruler.json)")
    add("--job", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ruler_prompts = args.ruler_prompts or args.corpus / "ruler.json"
    plan = tomllib.loads(args.plan.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job:
        work(plan, args)
        return
    deadline = time.time() + args.budget_seconds
    vocabulary = load_checkpoint(str(args.model), policy="h2o", mem_size=256, block_size=512).geometry.vocab_size
    for folder in ("train", *(f"held_out/{kind}" for kind in KINDS)):  # once, before the jobs
        load_corpus([args.corpus / folder], args.model, vocabulary, cache_dir=args.out / "tokens")
    if args.ruler:
        if not args.ruler_prompts.exists():
            save_prompts(args.ruler_prompts, make_prompts(args.model, args.ruler, args.ruler_examples))
        prompts = read_prompts(args.ruler_prompts)
        encode_prompts(prompts, load_tokenizer(args.model))  # refuses another model's
        missing = set(args.ruler) - {p.context for p in prompts}
        if missing:
            raise SystemExit(
                f"{args.ruler_prompts}: has no prompts of {sorted(missing)} tokens; delete it to make them"
            )
    waiting = [j["name"] for j in plan["job"] if not args.jobs or j["name"] in args.jobs]
    alone = {j["name"] for j in plan["job"] if "speed" in j}
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}  # device and process
    failed: list[str] = []
    while waiting or running:
        for name, (_, process) in list(running.items()):
            if process.poll() is not None:
                print(f"== {name}: exit {process.returncode}, {deadline - time.time():.0f} s left", flush=True)
                del running[name]
                failed += [name] * (process.returncode != 0)
        late = time.time() > deadline
        if late:
            for _, process in running.values():
                process.kill()
            waiting.clear()
        busy = set(running) & alone
        loads = [sum(d == device for d, _ in running.values()) for device in range(args.devices)]
        if waiting and not busy and (not running if waiting[0] in alone else min(loads) < args.parallel):
            name, device = waiting.pop(0), loads.index(min(loads))
            where = f", GPU {device}" if args.devices > 1 else ""
            print(f"== {name}: starts, {deadline - time.time():.0f} s left{where}", flush=True)
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": str(device)} if args.devices > 1 else {})
            command = [sys.executable, *sys.argv, "--job", name, "--deadline", str(deadline)]
            running[name] = device, subprocess.Popen(command, env=env)
        time.sleep(0.2)
    if failed:
        raise SystemExit(f"failed or cut off: {', '.join(failed)}")


if __name__ == "__main__":
    main()
