"""lococo-run and lococo-inspect."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ._exceptions import InvalidArgumentError, LococoError, NotFoundError
from .bundle import Manifest, read_manifest
from .llm import load_tokenizer, stream_text
from .sampling import SamplingParams
from .session import Model, Session


def guarded(main: Callable[[], int]) -> int:
    """Runs a command; an error of ours becomes one line on stderr and exit code 1, Ctrl-C becomes 130."""
    try:
        return main()
    except LococoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def show_step(step: str) -> None:
    """A line of progress, on stderr."""
    print(f"  {step}", file=sys.stderr)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises NotFoundError, InvalidArgumentError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found") from e
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"{path}: expected UTF-8 text: {e}") from e


def run_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-run."""
    parser = argparse.ArgumentParser(
        prog="lococo-run", description="Read a prompt of any length through the slot cache and continue it."
    )
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("--prompt", help="text to continue; with --file it follows the file")
    parser.add_argument("--file", type=Path, help="text file to read first")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest up to this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load-state", type=Path, metavar="FILE", help="continue from a saved state")
    parser.add_argument("--save-state", type=Path, metavar="FILE", help="save the state after reading the prompt")
    parser.add_argument("--threads", type=int, default=0, help="0 = one per physical core")
    args = parser.parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, max_tokens=args.max_tokens
    )
    text = (read_text(args.file) if args.file else "") + (args.prompt or "")
    tokenizer = load_tokenizer(args.bundle)
    ids = tokenizer.encode(text).ids if text else []
    if not ids and not args.load_state:
        raise InvalidArgumentError("nothing to read: pass --prompt, --file or --load-state")
    with Model(args.bundle, num_threads=args.threads) as model, Session(model) as session:
        if args.load_state:
            session.load(args.load_state)
        start = time.perf_counter()
        read_with_progress(session, ids)
        read_s = time.perf_counter() - start
        if args.save_state:
            session.save(args.save_state)
        start, count = time.perf_counter(), 0

        def counted() -> Iterator[int]:
            nonlocal count
            for token in session.generate([], params):
                count += 1
                yield token

        for piece in stream_text(tokenizer, counted()):
            print(piece, end="", flush=True)
        write_s = time.perf_counter() - start
        print()
        print(
            f"read {len(ids):,} tokens in {read_s:.1f} s"
            + (f" ({len(ids) / read_s:.0f} tokens/s)" if ids else "")
            + f", wrote {count:,} in {write_s:.1f} s"
            + (f" ({count / write_s:.1f} tokens/s)" if count else "")
            + f"; position {session.position:,}, {session.live_slots} live slots, state {session.state_bytes:,} bytes",
            file=sys.stderr,
        )
    return 0


def read_with_progress(session: Session, ids: Sequence[int]) -> None:
    """Prefills block by block, with a progress line on stderr where it is a terminal."""
    block = session.model.manifest.cache.block_size
    show = sys.stderr.isatty() and len(ids) > block
    for first in range(0, len(ids), block):
        session.prefill(ids[first : first + block])
        if show:
            done = min(first + block, len(ids))
            print(f"\rreading {done:,}/{len(ids):,} tokens", end="", file=sys.stderr, flush=True)
    if show:
        print(file=sys.stderr)


def inspect_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-inspect."""
    parser = argparse.ArgumentParser(prog="lococo-inspect", description="Show what a bundle is and what it needs.")
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    args = parser.parse_args(argv)

    def show() -> int:
        print(describe(read_manifest(args.bundle)))
        return 0

    return guarded(show)


def describe(manifest: Manifest) -> str:
    """A table of geometry, cache, bytes and files that a person can read."""
    m, c = manifest.model, manifest.cache
    slots = f"{c.keep} kept ({c.local_len} recent), {c.num_mixed} mixed"
    total = sum(f.nbytes for f in manifest.files)
    rows = [
        ("bundle", manifest.bundle_id[:16]),
        ("made by", f"{manifest.producer} from {manifest.provenance.get('source')}"),
        ("model", f"{m.family}, {m.num_layers} layers, hidden {m.hidden_size}, vocabulary {m.vocab_size:,}"),
        ("heads", f"{m.num_heads} query, {m.num_kv_heads} key/value, head_dim {m.head_dim}"),
        ("rope", ", ".join(f"{k} {v}" for k, v in m.rope.items())),
        ("dtype", manifest.dtype),
        ("policy", c.policy),
        ("slots", f"{c.mem_size} after a fusion: {slots}; a fusion fires above {c.capacity}"),
        ("block", f"{c.block_size} tokens"),
        *([("fusion", f"{c.num_conv_layers} conv, kernel {c.kernel_size}, {c.activation}")] if c.num_mixed else []),
        ("state", f"{manifest.state_bytes:,} bytes a session, at any context length"),
        ("files", f"{len(manifest.files)}, {total:,} bytes"),
        *[("", f"{f.nbytes:>15,}  {f.path}") for f in manifest.files],
    ]
    return "\n".join(f"{name:<8} {value}" for name, value in rows)
