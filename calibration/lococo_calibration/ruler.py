"""RULER (arXiv 2404.06654): its tasks that make their data on the spot, for many policies on the same prompts.

lm-evaluation-harness makes the prompts; they are kept in a file, so that machines without it can measure too. Answers
are greedy, and scored as there: the share of the wanted strings that the answer holds, whatever their case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lococo_runtime import CorruptError, InvalidArgumentError
from lococo_runtime._exceptions import ConfigError, UnsupportedError
from lococo_runtime.bundle import storage_error
from lococo_runtime.llm import load_tokenizer

from lococo_export.reference import ReferenceModel

from .blocks import Policy
from .generate import generate

RULER_TASKS = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe")
NUMPY_SEED = 1234  # the harness's own default


@dataclass(frozen=True)
class RulerPrompt:
    """One example of a task."""

    task: str
    context: int  # tokens of prompt and answer, at most
    prompt: str
    tokens: int  # of the prompt
    outputs: list[str]  # what an answer should hold
    max_new_tokens: int


@dataclass(frozen=True)
class RulerRow:
    """One policy on one task."""

    policy: str
    mem_size: int
    task: str
    context: int
    examples: int
    score: float  # 0 to 1


def load_tasks(model: Path, names: Sequence[str], contexts: Sequence[int], seed: int) -> Any:
    """A TaskManager of lm-evaluation-harness that makes the tasks' examples once, however often it is asked.

    Raises:
        UnsupportedError: lm-eval is missing.
        InvalidArgumentError: a task or context that it does not take.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as e:
        raise UnsupportedError(f"tasks: {e}; pip install 'lococo-export[fit-all]'") from e
    random.seed(seed)
    np.random.seed(NUMPY_SEED)
    manager = TaskManager(metadata={"pretrained": str(model), "max_seq_lengths": list(contexts)})
    try:
        loaded = manager.load(list(names))
    except (KeyError, ValueError) as e:  # an unknown task; a context that has no room for an example
        raise InvalidArgumentError(f"tasks: {e.args[0]}") from e
    manager.load = lambda _: loaded  # as long as the examples are the same, so are the prompts of every policy
    return manager


def first_examples(manager: Any, limit: int) -> dict[str, list[int]]:
    """The first `limit` examples of every task, and of every context where a task has several."""
    chosen: dict[str, list[int]] = {}
    for name, task in manager.load([])["tasks"].items():
        counts: dict[Any, int] = {}
        chosen[name] = []
        for number, doc in enumerate(task.eval_docs):
            context = doc.get("max_length")
            counts[context] = counts.get(context, 0) + 1
            if counts[context] <= limit:
                chosen[name].append(number)
    return chosen


def make_prompts(
    model: Path, contexts: Sequence[int], examples: int, *, seed: int = 0, tasks: Sequence[str] = RULER_TASKS
) -> list[RulerPrompt]:
    """The first examples of every task and context, as lococo-eval --tasks gives them with the same arguments.

    Raises:
        UnsupportedError: lm-eval is missing.
    """
    manager = load_tasks(model, tasks, contexts, seed)
    chosen = first_examples(manager, examples)
    tokenizer, found = load_tokenizer(model), []
    for name, task in manager.load([])["tasks"].items():
        task.build_all_requests(samples=chosen[name], rank=0, world_size=1)
        for instance in task.instances:
            prompt, options = instance.args
            doc, tokens = instance.doc, len(tokenizer.encode(prompt, add_special_tokens=False).ids)
            context, outputs = doc["max_length"], list(doc["outputs"])
            found.append(RulerPrompt(name, context, prompt, tokens, outputs, options["max_gen_toks"]))
    return found


def save_prompts(path: Path, prompts: Sequence[RulerPrompt]) -> None:
    """Writes prompts as JSON."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([dataclasses.asdict(p) for p in prompts], indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise storage_error(e, path) from e


def read_prompts(path: Path) -> list[RulerPrompt]:
    """What `save_prompts` wrote.

    Raises:
        CorruptError: another kind of file.
    """
    try:
        return [RulerPrompt(**p) for p in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as e:
        raise CorruptError(f"{path}: not prompts of RULER: {e}; make them again") from e


def encode_prompts(prompts: Sequence[RulerPrompt], tokenizer: Any) -> list[list[int]]:
    """Their tokens.

    Raises:
        ConfigError: the prompts' lengths go by another tokenizer.
    """
    ids = [tokenizer.encode(p.prompt, add_special_tokens=False).ids for p in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) != prompt.tokens:
            raise ConfigError(
                f"{prompt.task}: expected a prompt of {prompt.tokens} tokens, got {len(tokens)}: made for another"
                " tokenizer; make the prompts again"
            )
    return ids


def score(answer: str, outputs: Sequence[str]) -> float:
    """The share of `outputs` that the answer holds."""
    answer = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(wanted.lower() in answer for wanted in outputs) / len(outputs)


def ruler_rows(
    model: ReferenceModel,
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[RulerPrompt],
    *,
    block_size: int,
    batch: int = 8,
) -> list[RulerRow]:
    """Scores of one policy, all prompts side by side.

    Args:
        tokenizer: of the `tokenizers` library.
        batch: prompts read at once.

    Raises:
        ConfigError: the prompts' lengths go by another tokenizer.
    """
    ids = encode_prompts(prompts, tokenizer)
    limits = [p.max_new_tokens for p in prompts]
    found = generate(model, policy, ids, limits, block_size=block_size, batch=batch)
    scores: dict[tuple[str, int], list[float]] = {}
    for prompt, tokens in zip(prompts, found, strict=True):
        scores.setdefault((prompt.task, prompt.context), []).append(score(tokenizer.decode(tokens), prompt.outputs))
    return [
        RulerRow(policy.name, policy.mem_size, task, context, len(values), sum(values) / len(values))
        for (task, context), values in scores.items()
    ]
