"""What lococo-eval does: every policy over the same windows and prompts, on PyTorch and by the runtime."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lococo_runtime import CorruptError, InvalidArgumentError, Session
from lococo_runtime._exceptions import ConfigError, UnsupportedError
from lococo_runtime.bundle import LococoConfig

from lococo_export.checkpoints import HEADS_CONFIG_NAME, Checkpoint, load_checkpoint
from lococo_export.reference import ReferenceModel

from .blocks import FullCache, Fusion, Policy, Streaming
from .data import DEFAULT_CACHE, Corpus, load_corpus
from .evaluate import (
    PasskeyRow,
    PerplexityRow,
    as_json,
    check_contexts,
    choose_windows,
    difference_table,
    passkey_model,
    passkey_prompts,
    passkey_rows,
    passkey_session,
    passkey_table,
    perplexity_rows,
    perplexity_table,
    session_nll,
    tasks_table,
    window_nll,
)
from .fit import RECORD_NAME
from .ruler import first_examples, load_tasks
from .settings import DTYPES, choose_device

Show = Callable[[str], None]
DEFAULT_BLOCK, DEFAULT_BUFFER = 512, 16


@dataclass(frozen=True)
class Report:
    """For people, and for machines."""

    text: str
    document: dict[str, Any]


def evaluate(args: argparse.Namespace, show: Show) -> Report:
    """Runs what the flags of lococo-eval ask for."""
    checkpoint = _checkpoint(args)
    model = ReferenceModel(checkpoint, DTYPES[args.dtype], choose_device(args.device))
    block = args.block_size or checkpoint.config.block_size
    if checkpoint.config.policy == "lococo" and block != checkpoint.config.block_size:
        raise ConfigError(f"--block-size: got {block}, but the heads were fitted with {checkpoint.config.block_size}")
    policies = _policies(args, checkpoint, model, block)
    longest = max([*(args.contexts if args.text else []), *args.passkey, *args.needle, 0])
    window = checkpoint.sliding_window
    if window and longest > window and "full" in args.policies:
        raise ConfigError(
            f"--policies full: the model looks back {window} tokens (sliding_window), which a full cache of {longest}"
            f" goes beyond; expected contexts of at most {window}, or --policies lococo h2o streaming"
        )
    document: dict[str, Any] = {
        "model": checkpoint.source_dir.name,
        "cache": dataclasses.asdict(checkpoint.config),
        "dtype": args.dtype,
        "device": str(model.device),
        "block_size": block,
    }
    parts: list[str] = []
    rows: list[PerplexityRow] = []
    found: list[PasskeyRow] = []
    if args.text:
        rows, about = _perplexity(args, checkpoint, model, policies, block, show)
        document |= {**about, "perplexity": as_json(rows)}
        parts += [perplexity_table(rows), difference_table(rows), *_agreement(rows)]
    if args.passkey or args.needle:
        found = _passkey(args, checkpoint, model, policies, block, show)
        document["passkey"] = as_json(found)
        parts.append(passkey_table(found))
    if args.tasks:
        document["tasks"] = _tasks(args, checkpoint, model, policies, block, show)
        parts.append(tasks_table(document["tasks"]))
    if args.plots:
        from .plots import plot

        parts.append("\n".join(str(path) for path in plot(rows, found, args.plots)))
    return Report("\n\n".join(filter(None, parts)), document)


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    if (Path(args.model) / HEADS_CONFIG_NAME).exists():
        return load_checkpoint(args.model)
    sizes = args.mem_size or [256]
    return load_checkpoint(
        args.model,
        policy="h2o",
        mem_size=sizes[0],
        block_size=args.block_size or DEFAULT_BLOCK,
        buffer=DEFAULT_BUFFER if args.buffer is None else args.buffer,
    )


def _policies(args: argparse.Namespace, checkpoint: Checkpoint, model: ReferenceModel, block: int) -> list[Policy]:
    cache = checkpoint.config
    buffer = cache.buffer if args.buffer is None else args.buffer
    policies: list[Policy] = []
    if "full" in args.policies:
        policies.append(FullCache())
    if "lococo" in args.policies and cache.policy == "lococo":
        policies.append(Fusion(cache, model.heads))
    for mem_size in args.mem_size or [cache.mem_size]:
        if "h2o" in args.policies:
            policies.append(Fusion(LococoConfig.h2o(mem_size, block, buffer)))
        if "streaming" in args.policies:
            policies.append(Streaming(model, mem_size, buffer))
    if not policies and not args.bundle:
        raise InvalidArgumentError(f"--policies: {args.model} has no fusion heads; fit some first, or name others")
    return policies


def _corpus(args: argparse.Namespace, checkpoint: Checkpoint, show: Show) -> tuple[Corpus, list[int]]:
    """The texts, and the documents that the heads were not fitted on."""
    corpus = load_corpus(
        args.text,
        checkpoint.source_dir,
        checkpoint.geometry.vocab_size,
        text_field=args.text_field,
        cache_dir=args.cache_dir or DEFAULT_CACHE,
    )
    record = checkpoint.source_dir / RECORD_NAME
    trained = set()
    if record.exists():
        try:
            trained = {d["sha256"] for d in json.loads(record.read_text(encoding="utf-8"))["trained_on"]}
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptError(f"{record}: not a record of lococo-fit: {e}; remove it to measure on any text") from e
    unseen = [d for d in range(len(corpus)) if corpus.digests[d] not in trained]
    if len(unseen) < len(corpus):
        show(f"note: {len(corpus) - len(unseen)} document(s) left out, the heads were fitted on them")
    if not unseen:
        raise InvalidArgumentError("--text: the heads were fitted on every one of these documents; give others")
    return corpus, unseen


def _perplexity(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    model: ReferenceModel,
    policies: list[Policy],
    block: int,
    show: Show,
) -> tuple[list[PerplexityRow], dict[str, Any]]:
    corpus, unseen = _corpus(args, checkpoint, show)
    contexts = sorted(set(args.contexts))
    windows = choose_windows(corpus, contexts[-1], args.windows, unseen)
    ids = corpus.read(windows, contexts[-1])
    documents = [corpus.names[d] for d, _ in windows]
    for policy in policies:
        check_contexts(contexts, policy, block)
    rows: list[PerplexityRow] = []

    def add(nll: Any, since: float, **what: Any) -> None:
        rows.extend(perplexity_rows(nll, contexts, documents, **what))
        label = " ".join(str(v) for v in what.values())
        show(f"{label}: perplexity {rows[-1].perplexity:.3f} at {contexts[-1]:,}, {time.perf_counter() - since:.1f} s")

    for policy in policies:
        # without a fusion both regimes are the same
        for regime in args.regimes if policy.capacity is not None else ("block",):
            since, step_from = time.perf_counter(), block if regime == "step" else None
            nll = window_nll(model, policy, ids, block_size=block, step_from=step_from, batch=args.batch)
            add(nll, since, policy=policy.name, mem_size=policy.mem_size, regime=regime, backend="pytorch")
    for bundle in args.bundle:
        with Session(bundle) as session:
            cache = session.model.manifest.cache
            if cache.block_size != block:
                raise ConfigError(f"{bundle}: block_size: expected {block}, got {cache.block_size}; cannot compare")
            for regime in args.regimes:
                since, step_from = time.perf_counter(), block if regime == "step" else None
                nll = session_nll(session, ids, step_from=step_from)
                add(nll, since, policy=cache.policy, mem_size=cache.mem_size, regime=regime, backend="onnxruntime")
    about = {"windows": len(windows), "documents": sorted(set(documents)), "tokenizer_and_text": corpus.key}
    return rows, about


def _agreement(rows: list[PerplexityRow]) -> list[str]:
    """A line for every bundle figure that PyTorch has too."""
    torch_rows = {(r.policy, r.mem_size, r.regime, r.context): r for r in rows if r.backend == "pytorch"}
    lines = []
    for row in rows:
        same = torch_rows.get((row.policy, row.mem_size, row.regime, row.context))
        if row.backend != "pytorch" and same:
            percent = 100 * (row.perplexity / same.perplexity - 1)
            lines.append(f"{row.policy} {row.regime} at {row.context}: {row.backend} {percent:+.4f} % from pytorch")
    return ["\n".join(lines)] if lines else []


def _passkey(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    model: ReferenceModel,
    policies: list[Policy],
    block: int,
    show: Show,
) -> list[PasskeyRow]:
    from lococo_runtime.llm import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.source_dir)
    depths = [round(float(d), 3) for d in np.linspace(0, 1, args.passkey_depths)]
    rows: list[PasskeyRow] = []
    wanted = [(c, "filler") for c in sorted(set(args.passkey))] + [(c, "text") for c in sorted(set(args.needle))]
    for context, haystack in wanted:
        texts = None
        if haystack == "text":
            corpus, unseen = _corpus(args, checkpoint, show)
            chosen = choose_windows(corpus, context, args.windows, unseen)
            texts = [ids.tolist() for ids in corpus.read(chosen, context)]
        for policy in policies:
            check_contexts([context], policy, block)
        prompts = passkey_prompts(tokenizer, context, depths, args.passkey_trials, args.seed, texts)
        for policy in policies:
            correct = passkey_model(model, policy, prompts, block_size=block, batch=args.batch)
            what = {"policy": policy.name, "mem_size": policy.mem_size, "backend": "pytorch"}
            rows += passkey_rows(prompts, correct, **what, context=context, haystack=haystack)
            show(f"key in {haystack}, {context} {policy.name} {policy.mem_size}: {sum(correct)} of {len(correct)}")
        for bundle in args.bundle:
            with Session(bundle) as session:
                cache, correct = session.model.manifest.cache, passkey_session(session, prompts)
            what = {"policy": cache.policy, "mem_size": cache.mem_size, "backend": "onnxruntime"}
            rows += passkey_rows(prompts, correct, **what, context=context, haystack=haystack)
    return rows


def _tasks(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    model: ReferenceModel,
    policies: list[Policy],
    block: int,
    show: Show,
) -> list[dict[str, Any]]:
    """A row for every policy, task and metric of lm-evaluation-harness."""
    try:
        from lm_eval import simple_evaluate

        from .harness import LococoLM
    except ModuleNotFoundError as e:
        raise UnsupportedError(f"--tasks: {e}; pip install 'lococo-export[fit-all]'") from e
    manager = load_tasks(checkpoint.source_dir, args.tasks, args.task_lengths, args.seed)
    samples = None if args.task_limit is None else first_examples(manager, args.task_limit)
    rows = []
    for policy in policies:
        found = simple_evaluate(
            LococoLM.of(model, policy, checkpoint.source_dir, block, args.batch),
            tasks=args.tasks,
            task_manager=manager,
            samples=samples,
            bootstrap_iters=0,
            random_seed=args.seed,
        )
        for task, metrics in found["results"].items():
            for name, value in metrics.items():
                # RULER's metrics are lengths; it says -1 of those that were not asked for
                if isinstance(value, (int, float)) and not name.startswith("sample") and value >= 0:
                    metric = name.removesuffix(",none")
                    if "stderr" not in metric:
                        rows.append({"policy": policy.name, "mem_size": policy.mem_size, "task": task,
                                     "metric": metric, "value": float(value)})  # fmt: skip
        show(f"{policy.name} {policy.mem_size}: {', '.join(args.tasks)} done")
    return rows
