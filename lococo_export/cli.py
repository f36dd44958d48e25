"""lococo-export and lococo-verify."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo_runtime import InvalidArgumentError, UnsupportedError
from lococo_runtime._process import memory_bytes
from lococo_runtime.bundle import ACTIVATIONS, POLICIES
from lococo_runtime.cli import backend_of, guarded, read_text, show_step

DTYPE_FLAGS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-export."""
    parser = argparse.ArgumentParser(
        prog="lococo-export",
        usage="%(prog)s --model DIR [-o DIR] [--fp16] [options]",
        description="Turn a LoCoCo checkpoint into a bundle of static ONNX graphs.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="bundle to make (default MODEL-POLICY-DTYPE)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="also step N sessions at once (1: do not)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin")
    parser.add_argument("--no-engines", action="store_true", help="do not build TensorRT engines where there is a GPU")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--dtype", choices=DTYPE_FLAGS, default="fp32", metavar="T", help="fp32 (default), fp16 or bf16"
    )
    for flag in ("fp16", "bf16"):
        precision.add_argument(f"--{flag}", dest="dtype", action="store_const", const=flag, help=f"--dtype {flag}")
    add_cache_flags(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: _export(args))


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """The slot-cache settings that a checkpoint may leave open."""
    group = parser.add_argument_group("slot cache, where the checkpoint does not say")
    group.add_argument("--policy", choices=POLICIES, metavar="P", help="lococo, or h2o, which needs no trained heads")
    group.add_argument("--mem-size", type=int, metavar="M", help="slots left by a fusion")
    group.add_argument("--hh-keep-rate", type=float, metavar="R", help="share of slots kept verbatim (0.5)")
    group.add_argument("--local-len", type=int, metavar="N", help="most recent slots always kept (0)")
    group.add_argument("--block-size", type=int, metavar="B", help="tokens of one forward (M)")
    group.add_argument("--buffer", type=int, metavar="N", help="slots above M before a fusion fires (16)")
    group.add_argument("--fusion-activation", choices=ACTIVATIONS, metavar="A", help=f"{', '.join(ACTIVATIONS)} (relu)")


def cache_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load_checkpoint` that `add_cache_flags` parsed."""
    names = ("policy", "mem_size", "hh_keep_rate", "local_len", "block_size", "buffer")
    return {**{n: getattr(args, n) for n in names}, "activation": args.fusion_activation}


def _export(args: argparse.Namespace) -> int:
    from .checkpoints import load_checkpoint
    from .export import export_bundle

    start = time.perf_counter()
    checkpoint = load_checkpoint(args.model, allow_pickle=args.allow_pickle, **cache_flags(args))
    config, dtype = checkpoint.config, DTYPE_FLAGS[args.dtype]
    output = args.output or Path(f"{args.model.resolve().name}-{config.policy}-{args.dtype}")
    if checkpoint.heads_ignored:
        print("note: the checkpoint's fusion heads are not used by policy h2o", file=sys.stderr)

    manifest = export_bundle(checkpoint, output, dtype=dtype, batch=args.batch, force=args.force, progress=show_step)
    peak_mib = memory_bytes("VmHWM") / 2**20
    print(
        f"{output}: {config.policy}, {config.mem_size} slots, {args.dtype}, state {manifest.state_bytes:,} bytes,"
        f" {time.perf_counter() - start:.1f} s, peak memory {peak_mib:,.0f} MiB"
    )
    if not args.no_engines:
        _build_engines(output)
    return 0


def _build_engines(bundle: Path) -> None:
    """Builds TensorRT engines where there is a GPU, and says what to run where there is none."""
    from lococo_engines import build_engines, choose

    target = None
    try:
        recipe, target = choose("auto", None, bundle)
        print(f"building TensorRT engines here, for {target.device}; --no-engines leaves them out", file=sys.stderr)
        print(build_engines(bundle, recipe, target, progress=show_step))
    except UnsupportedError as e:
        # without a target the error itself says where to build
        then = "" if target is None else f"\nThen run here: lococo-build {shlex.quote(str(bundle))}"
        print(f"note: no TensorRT engines were built: {e}{then}", file=sys.stderr)


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-verify."""
    parser = argparse.ArgumentParser(
        prog="lococo-verify",
        description="Compare a bundle with PyTorch forward by forward: logits, and the state at every fusion.",
        epilog="Exit code 0: agrees; 1: diverges, or an error.",
    )
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint it was made from")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to read (default: random tokens)")
    parser.add_argument(
        "--prefill",
        "--prompt-tokens",
        dest="prompt_tokens",
        type=int,
        default=1024,
        metavar="N",
        help="tokens to read in blocks (1024)",
    )
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="then one by one (256)")
    parser.add_argument("--device", default="cpu", metavar="D", help="of both sides: cpu, or cuda:0 and on")
    parser.add_argument("--backend", metavar="B", help="onnxruntime or tensorrt (by the device)")
    parser.add_argument("--perplexity", type=int, default=0, metavar="N", help="then of N tokens, each side for itself")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--atol", type=float, help="largest difference of logits")
    parser.add_argument("--free-running", action="store_true", help="do not hand the state over at fusions")
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="if it diverges: that forward's graph and inputs, for Polygraphy"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin")
    args = parser.parse_args(argv)
    return guarded(lambda: _verify(args))


def _verify(args: argparse.Namespace) -> int:
    import dataclasses

    import torch
    from lococo_runtime import Session
    from lococo_runtime._c_api import library_log
    from lococo_runtime.bundle import producer

    from .onnx_writer import TORCH_DTYPES
    from .reference import ReferenceModel
    from .verify import Tolerance, checkpoint_of, dump_forward, perplexities, require_dump, verify_bundle

    for flag, value, least in (
        ("--prefill", args.prompt_tokens, 1),
        ("--steps", args.steps, 0),
        ("--perplexity", args.perplexity, 0),
        ("--seed", args.seed, 0),
        ("--atol", 0 if args.atol is None else args.atol, 0),
    ):
        if not value >= least:  # nor nan
            raise InvalidArgumentError(f"{flag}: expected at least {least}, got {value}")
    backend = args.backend or backend_of(args.device)

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\rverified {done:,}/{total:,} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True
            )

    with library_log() as log:
        session = Session(args.bundle, device=args.device, backend=backend)
    with session:
        manifest = session.model.manifest
        if args.dump is not None:
            require_dump(manifest, args.dump)
        checkpoint = checkpoint_of(manifest, args.model, allow_pickle=args.allow_pickle)
        tolerance = Tolerance.for_dtype(manifest.dtype)
        if args.atol is not None:
            tolerance = dataclasses.replace(tolerance, logits_max_abs=args.atol)
        ids = _verify_ids(args, manifest.model.vocab_size)
        reference = ReferenceModel(checkpoint, TORCH_DTYPES[manifest.dtype], _torch_device(args.device))
        start = time.perf_counter()
        report = verify_bundle(
            session,
            reference,
            ids[: args.prompt_tokens + args.steps],
            args.steps,
            tolerance=tolerance,
            free_running=args.free_running,
            third=None if (backend, args.device) == ("onnxruntime", "cpu") else lambda: Session(args.bundle),
            progress=show,
        )
        print(report)
        if args.dump is not None and report.divergence is not None:
            print(f"every tensor of that forward: {dump_forward(args.bundle, manifest, report.divergence, args.dump)}")
        used = [line for line in log if line.startswith(("TensorRT ", "ONNX Runtime "))]  # versions, device, engines
        print("; ".join([*used, f"PyTorch {torch.__version__}", producer("lococo-verify")]))
        print(f"{backend} on {args.device}, {time.perf_counter() - start:.0f} s")
        agrees = report.agrees
        if args.perplexity:
            ours, theirs = perplexities(session, reference, ids[: args.perplexity], show)
            off = abs(ours / theirs - 1)
            agrees &= off <= tolerance.perplexity
            print(
                f"perplexity of {args.perplexity:,} tokens, each side for itself: {ours:.4f}, PyTorch {theirs:.4f}:"
                f" off by {off:.2e} (at most {tolerance.perplexity:g})"
            )
    return 0 if agrees else 1


def _torch_device(name: str) -> str:
    """`name`, if torch can use it."""
    import torch

    if name != "cpu" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"--device {name}: this PyTorch ({torch.__version__}) sees no CUDA device; install a CUDA build of torch"
        )
    return name


def _verify_ids(args: argparse.Namespace, vocab_size: int) -> list[int]:
    import numpy as np
    from lococo_runtime.llm import load_tokenizer

    count = max(args.prompt_tokens + args.steps, args.perplexity)
    if args.text is None:
        random: list[int] = np.random.default_rng(args.seed).integers(0, vocab_size, count).tolist()
        return random
    ids: list[int] = load_tokenizer(args.bundle).encode(read_text(args.text)).ids
    if len(ids) < count:
        raise InvalidArgumentError(f"{args.text}: expected at least {count:,} tokens, got {len(ids):,}")
    return ids[:count]
