"""lococo-fit and lococo-eval."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo_runtime import InvalidArgumentError
from lococo_runtime._exceptions import ConfigError
from lococo_runtime.bundle import storage_error
from lococo_runtime.cli import guarded, read_text

POLICY_NAMES = ("full", "lococo", "h2o", "streaming")


def fit_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-fit."""
    from .settings import FitSettings

    parser = argparse.ArgumentParser(
        prog="lococo-fit",
        description="Fit fusion heads to a frozen model; makes what lococo-export reads.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML with any of the settings below; flags win")
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUTPUT.fit")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT, and a state that is not resumed")
    parser.add_argument("--estimate-only", action="store_true", help="measure time and memory, train nothing")
    for f in dataclasses.fields(FitSettings):
        flags = ["-o"] * (f.name == "output") + [f"--{f.name.replace('_', '-')}"]
        shown = "" if f.default in ("", ()) or isinstance(f.default, bool) else f" (default {f.default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name, "help": f.metadata["help"] + shown}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options["nargs"] = "+"
        else:
            options["type"] = type(f.default)
        parser.add_argument(*flags, **options)
    given = vars(parser.parse_args(argv))
    return guarded(lambda: _fit(given))


def _fit(given: dict[str, Any]) -> int:
    from .fit import Fit
    from .settings import FitSettings, memory_advice

    config, resume, force, only = (given.pop(k) for k in ("config", "resume", "force", "estimate_only"))
    settings = {**(_read_toml(config) if config else {}), **given}
    names = {f.name for f in dataclasses.fields(FitSettings)}
    if settings.keys() - names:
        raise ConfigError(f"{config}: unknown settings {sorted(settings.keys() - names)}; known: {sorted(names)}")
    with memory_advice(lambda: "out of memory while the model was loaded: expected a larger device"):
        fit = Fit(FitSettings(**settings), resume=resume, force=force, progress=sys.stderr.isatty())
    output = fit.run(estimate_only=only)
    if not only and fit.workers.first:
        ppl = ", ".join(f"{k} {v:.3f}" for k, v in fit.held_out.items())
        print(f"{output}: {fit.step} steps" + (f", held-out perplexity: {ppl}" if ppl else ""))
    return 0


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document: dict[str, Any] = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}") from e
    settings = {key.replace("-", "_"): value for key, value in document.items()}
    if len(settings) < len(document):
        raise ConfigError(f"{path}: a setting is given twice, once with hyphens and once with underscores")
    return settings


# --- lococo-eval ------------------------------------------------------------------------------------------------------


def eval_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-eval."""
    parser = argparse.ArgumentParser(
        prog="lococo-eval",
        description="Perplexity by context length and passkey retrieval by depth, for cache policies side by side.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint of lococo-fit, or a plain model")
    add("--bundle", action="append", default=[], metavar="DIR", help="measure this bundle too; may be repeated")
    add("--text", nargs="+", default=[], metavar="PATH", help="documents; those the heads were fitted on are left out")
    add("--text-field", default="text", help="of JSONL objects and table columns")
    add("--policies", nargs="+", choices=POLICY_NAMES, default=list(POLICY_NAMES), help="default: all that apply")
    add("--mem-size", nargs="+", type=int, metavar="M", help="of h2o and streaming (default: the checkpoint's)")
    add("--block-size", type=int, metavar="B", help="tokens of a forward (default: the checkpoint's, else 512)")
    add("--buffer", type=int, metavar="N", help="slots above M (default: the checkpoint's, else 16)")
    add("--contexts", nargs="+", type=int, default=[2048, 4096], metavar="T", help="default 2048 4096")
    add("--regimes", nargs="+", choices=("block", "step"), default=["block"], help="step reads token by token")
    add("--windows", type=int, default=16, metavar="N", help="of the longest context, in turn from all documents (16)")
    add("--passkey", nargs="+", type=int, default=[], metavar="T", help="contexts to hide a pass key in")
    add("--needle", nargs="+", type=int, default=[], metavar="T", help="contexts to hide it in, within --text")
    add("--passkey-depths", type=int, default=5, metavar="N", help="places from start to end (5)")
    add("--passkey-trials", type=int, default=4, metavar="N", help="keys at each place (4)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-evaluation-harness, such as niah_single_1")
    add("--task-lengths", nargs="+", type=int, default=[4096], metavar="T", help="contexts of RULER's tasks (4096)")
    add("--task-limit", type=int, metavar="N", help="examples of a task (default: all)")
    add("--plots", type=Path, metavar="DIR", help="draw perplexity over context and pass keys over depth")
    add("--seed", type=int, default=0, help="of the pass keys")
    add("--batch", type=int, default=8, metavar="N", help="windows read at once (8)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="on PyTorch (fp32)")
    add("--device", default="auto", help="cpu, cuda; auto takes a GPU if there is one")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--cache-dir", type=Path, help="where tokenised text is kept")
    args = parser.parse_args(argv)
    return guarded(lambda: _eval(args))


def _eval(args: argparse.Namespace) -> int:
    from .report import evaluate
    from .settings import memory_advice

    if args.needle and not args.text:
        raise InvalidArgumentError("--needle: expected --text, whose documents are the haystack")
    if not args.text and not args.passkey and not args.tasks:
        raise InvalidArgumentError("expected --text for perplexity, --passkey for retrieval, --tasks, or several")
    for name in ("windows", "batch", "passkey_depths", "passkey_trials", "task_limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InvalidArgumentError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if min(args.contexts) < 4:
        raise InvalidArgumentError(f"--contexts: expected at least 4 tokens, got {min(args.contexts)}")
    advice = f"out of memory: lower --batch (now {args.batch}) or the contexts, or pass --dtype bf16"
    with memory_advice(lambda: advice):
        report = evaluate(args, lambda line: print(line, file=sys.stderr, flush=True))
    print(report.text)
    if args.json:
        try:
            args.json.write_text(json.dumps(report.document, indent=2) + "\n", encoding="utf-8")
        except OSError as e:
            raise storage_error(e, args.json) from e
    return 0
