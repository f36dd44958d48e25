"""lococo-bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lococo_runtime import InvalidArgumentError
from lococo_runtime.cli import backend_of, check_writable, guarded, show_step

from .against import IMPLEMENTATIONS, MAX_DEPTH, Against, check_implementations, import_torch
from .measure import Bench, Plan, Row
from .regression import FAIL_ABOVE, compare
from .report import FORMATS, add_ratios, check_plot, format_rows, plot, read_rows


def numbers(text: str) -> tuple[int, ...]:
    """ "512,4096" to (512, 4096); "0" alone, as in llama-bench, may stand for no test."""
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"expected numbers such as 512,4096, got {text!r}") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-bench."""
    parser = argparse.ArgumentParser(
        prog="lococo-bench",
        usage="%(prog)s BUNDLE [-p N,..] [-n N,..] [-d N,..] [-r N] [-o FORMAT] [options]",
        description="Measure a bundle: prompts, single steps and greedy generation, at any depth of context.",
        epilog="Exit code 1: slower than --baseline allows, or an error. On other hardware: SKIPPED, and 0.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26),
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory made by lococo-export")
    parser.add_argument(
        "-p", "--n-prompt", type=numbers, default=(512,), metavar="N", help="prompt tokens (512); 0: no"
    )
    parser.add_argument("-n", "--n-gen", type=numbers, default=(128,), metavar="N", help="tokens to generate (128)")
    parser.add_argument("-d", "--n-depth", type=numbers, default=(0,), metavar="N", help="tokens read before (0)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="timed runs of a test (5)")
    parser.add_argument(
        "-o", "--output", choices=FORMATS, default="md", metavar="F", help="md, json, jsonl or csv (md)"
    )
    parser.add_argument("-oe", "--output-err", choices=FORMATS, metavar="F", help="on stderr too")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, or cuda:0 and on")
    parser.add_argument("--backend", metavar="B", help="onnxruntime or tensorrt (by the device)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="0: one per physical core")
    parser.add_argument(
        "--depth-by",
        choices=("auto", "prefill", "position"),
        default="auto",
        metavar="W",
        help="prefill, position, or auto: prefill if it takes at most 30 s",
    )
    parser.add_argument("--against", metavar="A", help="torch: our reference and transformers too; or names, see docs")
    parser.add_argument("--model", type=Path, metavar="DIR", help="for --against: the bundle's checkpoint")
    parser.add_argument("--against-max-depth", type=int, metavar="N", help=f"for transformers ({MAX_DEPTH})")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency and memory: .svg, .png, ...")
    parser.add_argument("--baseline", type=Path, metavar="JSON", help="compare medians with an earlier run")
    parser.add_argument("--fail-above", type=float, metavar="X", help=f"largest ratio to it ({FAIL_ABOVE})")
    args = parser.parse_args(argv)
    return guarded(lambda: _bench(args))


def _bench(args: argparse.Namespace) -> int:
    plan = Plan(
        tuple(n for n in args.n_prompt if n != 0),
        tuple(n for n in args.n_gen if n != 0),
        args.n_depth,
        args.repetitions,
        args.depth_by,
    )
    if not (plan.n_prompt or plan.n_gen):
        raise InvalidArgumentError("nothing to measure: expected -p or -n above 0")
    fail_above = FAIL_ABOVE if args.fail_above is None else args.fail_above
    if not fail_above >= 1:
        raise InvalidArgumentError(f"--fail-above: expected at least 1, got {fail_above}")
    for flag, value, needed, other in (
        ("--model", args.model, "--against", args.against),
        ("--against-max-depth", args.against_max_depth, "--against", args.against),
        ("--fail-above", args.fail_above, "--baseline", args.baseline),
    ):
        if value is not None and other is None:
            raise InvalidArgumentError(f"{flag}: expected {needed} too, got {flag} alone")
    if args.plot:  # this and the next are refused before minutes of measuring
        if not plan.n_gen:
            raise InvalidArgumentError("--plot: draws generation; expected -n above 0")
        check_writable(args.plot)
        check_plot(args.plot)
    if args.against is not None and args.model is None:
        raise InvalidArgumentError("--against: expected --model, the checkpoint that the bundle was made from")
    implementations = IMPLEMENTATIONS if args.against == "torch" else tuple((args.against or "").split(","))
    if args.against is not None:
        check_implementations(implementations)
        import_torch()
    baseline = read_rows(args.baseline) if args.baseline else None
    backend = args.backend or backend_of(args.device)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        add_ratios(rows)
        if args.output == "jsonl":
            print(format_rows([row], "jsonl"), end="", flush=True)

    with Bench(args.bundle, device=args.device, backend=backend, num_threads=args.threads, progress=show_step) as bench:
        for row in bench.run(plan):
            add(row)
        manifest, device, common = bench.manifest, bench.device, bench.common
    if args.against is not None:
        for row in Against(
            manifest,
            args.model,
            device,
            common,
            implementations=implementations,
            max_depth=MAX_DEPTH if args.against_max_depth is None else args.against_max_depth,
            progress=show_step,
        ).run(plan):
            add(row)
    if args.output != "jsonl":
        print(format_rows(rows, args.output), end="")
    if args.output_err:
        print(format_rows(rows, args.output_err), end="", file=sys.stderr)
    if args.plot:
        plot(rows, args.plot)
    if baseline is None:
        return 0
    comparison = compare(baseline, rows, fail_above)
    print(comparison, file=sys.stderr)
    return 1 if comparison.failed else 0
