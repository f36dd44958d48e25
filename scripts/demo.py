"""Read a long text through a fixed number of cache slots, continue it, ask about it, and say what that took."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lococo_runtime import LLM, SamplingParams, Session
from lococo_runtime.bundle import DTYPE_BYTES
from lococo_runtime.llm import stream_text
from tqdm import tqdm

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Memory of this process, bytes, as Linux counts it."""

    resident: int
    anonymous: int
    mapped: int
    peak: int

    @classmethod
    def now(cls) -> Memory:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {key: value.split() for key, value in (line.split(":", 1) for line in lines)}
        return cls(*(int(fields[key][0]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile", "VmHWM")))


def read(session: Session, ids: list[int], checkpoint: int) -> tuple[float, Memory]:
    """Reads all ids with a progress bar -> seconds, and the memory once `checkpoint` tokens are read.

    One token at the checkpoint is read by itself, so that the graph for single tokens is warm there too.
    """
    block = session.model.manifest.cache.block_size
    start = time.perf_counter()
    with tqdm(total=len(ids), desc="reading", unit=" tokens", file=sys.stdout) as bar:
        for first in range(0, checkpoint - 1, block):
            bar.update(_prefill(session, ids[first : min(first + block, checkpoint - 1)]))
        session.step(ids[checkpoint - 1])
        bar.update(1)
        memory = Memory.now()
        for first in range(checkpoint, len(ids), block):
            bar.update(_prefill(session, ids[first : first + block]))
    return time.perf_counter() - start, memory


def _prefill(session: Session, ids: list[int]) -> int:
    session.prefill(ids)
    return len(ids)


def write(llm: LLM, session: Session, params: SamplingParams) -> tuple[float, int]:
    """Streams what the model writes -> seconds, and tokens sampled."""
    before, start = session.position, time.perf_counter()
    for piece in stream_text(llm.tokenizer, session.generate([], params)):
        print(piece, end="", flush=True)
    print("\n")
    return time.perf_counter() - start, session.position - before + 1  # the last one has not been read


def ask(llm: LLM, session: Session, question: str, params: SamplingParams) -> None:
    """Ends the text as a user's message in ChatML, SmolLM2's chat format, and streams the answer."""
    session.prefill(llm.tokenizer.encode(f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n").ids)
    print(f"{question}\n> ", end="")
    write(llm, session, params)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=CACHE / "bundles" / "smollm2-135m-h2o-256")
    parser.add_argument("--text", type=Path, default=CACHE / "texts" / "persuasion.txt", help="UTF-8 text to read")
    # with what is written, just under the 8,192 positions that SmolLM2 was trained for
    parser.add_argument("--tokens", type=int, default=8016, help="how much of it (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=72, help="how much to write (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--question", default="What is this text about?", help="asked about the text, after it")
    args = parser.parse_args()

    with LLM(args.bundle) as llm:
        model, cache, dtype = llm.model.manifest.model, llm.model.manifest.cache, llm.model.manifest.dtype
        ids = llm.tokenizer.encode(args.text.read_text(encoding="utf-8")).ids[: args.tokens]
        checkpoint = min(2000, len(ids))
        session = llm.session
        print(f"{args.text.name}: {len(ids):,} tokens through {cache.mem_size} slots, policy {cache.policy}, {dtype}")

        read_s, early = read(session, ids, checkpoint)
        print(f"\n...{llm.tokenizer.decode(ids[-60:])}", end=" [the model goes on:]")
        params = SamplingParams(args.temperature, top_p=0.9, seed=args.seed, max_tokens=args.max_tokens)
        write_s, written = write(llm, session, params)
        ask(llm, session, args.question, SamplingParams(max_tokens=args.max_tokens))
        late = Memory.now()

        slot_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[dtype]
        full = slot_bytes * session.position
        growth = late.resident - early.resident
        verdict = "it did not grow" if growth < MIB else f"it grew by {growth / MIB:.1f} MiB"
        print(f"""\
read     {len(ids):,} tokens in {read_s:.1f} s, {len(ids) / read_s:.0f} tokens/s
wrote    {written:,} tokens in {write_s:.1f} s, {written / write_s:.1f} tokens/s
state    {session.state_bytes:,} bytes at any position; a full cache at {session.position:,}: {full:,} bytes
memory   {mib(early.resident)} resident after {checkpoint:,} tokens, {mib(late.resident)} at the end: {verdict}
peak     {mib(late.peak)}; at the end {mib(late.anonymous)} allocated, {mib(late.mapped)} mapped files (weights)""")


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
