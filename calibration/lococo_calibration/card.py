"""The model card of a fitted checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .settings import FitSettings

CARD_NAME = "README.md"
SHOWN = 12
NOT_SHOWN = ("model", "text", "output", "cache_dir", "device", "log_every", "eval_every", "save_every", "text_field")


def model_card(settings: FitSettings, record: Mapping[str, Any], base_model: str) -> str:
    """Markdown: what the heads are for, what they were fitted on and how, and the held-out figures of the run."""
    cache = settings.cache
    default = {f.name: f.default for f in dataclasses.fields(FitSettings)}
    changed = {
        k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_SHOWN and v != default[k] and v != ""
    }
    tuned = ", ".join([*settings.tune, *(["LoRA on q, k, v, o (merged)"] if settings.lora else [])])
    windows = settings.batch * settings.accumulate * record["processes"]
    trained, held_out = record["trained_on"], record["held_out"]
    lines = [
        "---",
        f"base_model: {base_model}",
        "tags: [lococo, kv-cache]",
        "---",
        "",
        f"# LoCoCo fusion heads for {base_model}",
        "",
        f"Replaces the KV cache by {cache.mem_size} slots (arXiv 2406.05317). Made by lococo-fit; export with"
        " `lococo-export --model DIR`.",
        "",
        f"- slots: M = {cache.mem_size}, {cache.keep} kept verbatim ({cache.local_len} most recent), {cache.num_mixed}"
        f" mixed; blocks of {cache.block_size}, buffer {cache.buffer}",
        f"- weights of the model: {'tuned: ' + tuned if tuned else 'unchanged'}",
        f"- steps: {record['steps']:,} of {windows} windows of {settings.context:,} tokens, seed {settings.seed}",
        f"- data: {len(trained):,} documents ({_names(trained)})",
        f"- held out: {len(held_out):,} documents ({_names(held_out)})" if held_out else "- held out: nothing",
        f"- settings other than lococo-fit's defaults: {', '.join(f'{k} = {v}' for k, v in changed.items()) or 'none'}",
        "",
        "## Held-out perplexity",
        "",
    ]
    if record["held_out_perplexity"]:
        half = settings.context // 2
        lines += [f"Tokens {half:,} to {settings.context:,} of a window.", "", "| cache | perplexity |", "|---|---|"]
        names = {"full": "full", "lococo": "LoCoCo, in blocks", "lococo_step": "LoCoCo, token by token"}
        lines += [f"| {names[k]} | {v:.3f} |" for k, v in record["held_out_perplexity"].items()]
    else:
        lines.append("Not measured in this run; `lococo-eval` measures it.")
    return "\n".join(lines) + "\n"


def _names(documents: list[dict[str, str]]) -> str:
    names = [d["name"] for d in documents]
    more = f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
