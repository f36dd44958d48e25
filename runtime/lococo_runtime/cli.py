"""lococo-run and lococo-inspect."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ._exceptions import EmptyPromptError, InvalidArgumentError, LococoError, NotFoundError, StorageError
from .bundle import Manifest, read_manifest
from .chat import Chat
from .completion import CompletionStream
from .grammar import Grammar
from .llm import LLM
from .sampling import SamplingParams


def guarded(main: Callable[[], int]) -> int:
    """Runs a command; an error of ours becomes one line on stderr and exit code 1, Ctrl-C becomes 130.

    So does an error of stdout, and a reader that has gone away (`| head`) ends the command without a word.
    """
    _open_streams()
    try:
        return main()
    except LococoError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed at exit
        if not isinstance(e, BrokenPipeError):
            print(f"error: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _open_streams() -> None:
    """Makes sys.stdin, stdout and stderr usable: closed ones are empty, what an encoding lacks is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for the rest of the process
        elif isinstance(stream, io.TextIOWrapper) and stream.writable() and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def backend_of(device: str) -> str:
    """The backend that a command takes for a device where none is named."""
    return "onnxruntime" if device == "cpu" else "tensorrt"


def show_step(step: str) -> None:
    """A line of progress, on stderr."""
    print(f"  {step}", file=sys.stderr)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises NotFoundError, StorageError, InvalidArgumentError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise NotFoundError(f"{path}: not found") from e
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"{path}: expected UTF-8 text: {e}") from e


def check_writable(path: Path) -> None:
    """Raises NotFoundError or StorageError where a file cannot be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise NotFoundError(f"{path}: cannot write: {folder} is no folder; check the path")
    if not os.access(folder, os.W_OK) or (path.exists() and not path.is_file()):
        raise StorageError(f"{path}: cannot write; check the permissions, or choose another path")


def run_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of lococo-run."""
    parser = argparse.ArgumentParser(
        prog="lococo-run",
        usage="%(prog)s [options] bundle",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=27),
        description="Read a text of any length through the slot cache, then continue it or talk about it.",
    )
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("--prompt", help="text to continue, behind the file; with --chat the first message")
    parser.add_argument("--file", type=Path, help="text file to read first")
    parser.add_argument("--chat", action="store_true", help="converse; Ctrl-C ends an answer, Ctrl-D all")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--load-state", type=Path, metavar="FILE", help="go on from a saved state")
    parser.add_argument("--save-state", type=Path, metavar="FILE", help="save it: before writing, or after the chat")
    sampling = parser.add_argument_group("choosing tokens")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most to write at once (128)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    sampling.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 = all")
    sampling.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest up to this probability")
    sampling.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this times the likeliest")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 = none (default)")
    sampling.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text, or another"
    )
    sampling.add_argument("--json-schema", type=Path, metavar="FILE", help="write JSON, valid under this schema")
    sampling.add_argument("--regex", help="write what matches this")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, or cuda:0 and on")
    parser.add_argument("--backend", metavar="B", help="onnxruntime or tensorrt (by the device)")
    parser.add_argument("--threads", type=int, default=0, help="0 = one per physical core")
    args = parser.parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=args.stop,
    )
    if args.json_schema and args.regex:
        raise InvalidArgumentError("expected one of --json-schema and --regex, got both")
    if args.system and not args.chat:
        raise InvalidArgumentError("--system: needs --chat")
    if args.save_state:
        check_writable(args.save_state)  # before a long file is read
    grammar = Grammar.json_schema(read_text(args.json_schema)) if args.json_schema else None
    if args.regex:
        grammar = Grammar.regex(args.regex)
    text = (read_text(args.file) if args.file else "") + ("" if args.chat else args.prompt or "")
    if not (text or args.load_state or args.chat):
        if args.file:
            raise EmptyPromptError(f"{args.file}: expected some text, got an empty file")
        raise InvalidArgumentError("nothing to read: pass --prompt, --file, --load-state or --chat")
    backend = args.backend or backend_of(args.device)
    options = {"device": args.device, "backend": backend, "num_threads": args.threads}
    with LLM(args.bundle, **options) as llm, llm.model.session() as session:
        if args.chat:
            llm.chat_template.select()  # before a long file is read
        if args.load_state:
            session.load(args.load_state)
        start = time.perf_counter()
        num_read = llm.read(text, session, progress=_show_reading) if text else 0
        show_speed("read", num_read, time.perf_counter() - start)
        status = 0
        if args.chat:
            status = _converse(Chat(llm, _system(args), session=session), args.prompt, params, grammar)
        if args.save_state:
            session.save(args.save_state)
        if not args.chat:
            status = _write(llm.generate_stream("", params, grammar=grammar, session=session))
        print(
            f"position {session.position:,}, {session.live_slots} live slots, state {session.state_bytes:,} bytes",
            file=sys.stderr,
        )
    return status


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _converse(chat: Chat, first: str | None, params: SamplingParams, grammar: Grammar | None) -> int:
    """Answers messages until they end; 1 if one of them could not be answered."""
    status = 0
    for message in _messages(first):
        try:
            _write(chat.stream(message, params, grammar=grammar))
        except LococoError as e:  # the conversation is as it was
            print(f"error: {e}", file=sys.stderr)
            status = 1
    return status


def _messages(first: str | None) -> Iterator[str]:
    """The first one, then lines of stdin up to its end or Ctrl-C."""
    if first:
        yield first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


def _write(stream: CompletionStream) -> int:
    """Prints pieces as they come, and how fast they came; Ctrl-C ends them and makes it 130."""

    def write() -> None:
        for piece in stream:
            print(piece, end="", flush=True)

    start = time.perf_counter()
    main_thread = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel()) if main_thread else None
    try:
        with stream, ThreadPoolExecutor(1) as worker:  # a signal is not handled within a call of the C library
            worker.submit(write).result()
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
        print()
    show_speed("wrote", len(stream.output.token_ids), time.perf_counter() - start)
    return 130 if stream.output.finish_reason == "cancelled" else 0


def show_speed(what: str, count: int, seconds: float) -> None:
    """A line on stderr, if anything was done."""
    if count:
        print(f"{what} {count:,} tokens in {seconds:.1f} s ({count / seconds:.1f} tokens/s)", file=sys.stderr)


def _show_reading(done: int, total: int) -> None:
    """Progress on stderr, where it is a terminal."""
    if sys.stderr.isatty():
        print(f"\rreading {done:,}/{total:,} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)


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
        *([("batch", f"{manifest.max_batch} sessions stepped together")] if manifest.max_batch > 1 else []),
        *([("fusion", f"{c.num_conv_layers} conv, kernel {c.kernel_size}, {c.activation}")] if c.num_mixed else []),
        ("state", f"{manifest.state_bytes:,} bytes a session, at any context length"),
        ("files", f"{len(manifest.files)}, {total:,} bytes"),
        *[("", f"{f.nbytes:>15,}  {f.path}") for f in manifest.files],
    ]
    return "\n".join(f"{name:<8} {value}" for name, value in rows)
