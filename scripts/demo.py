"""Read a long text through a fixed number of cache slots, continue it, ask about it, and say what that took."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lococo_runtime import LLM, SamplingParams, Session
from lococo_runtime.bundle import DTYPE_BYTES
from tqdm import tqdm

CHECKPOINT = 2000  # tokens
CACHE = Path(__file__).resolve().parent.parent / ".cache"
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Memory of this process in bytes, as Linux counts it; a page that is mapped several times counts once (Pss)."""

    allocated: int
    mapped: int  # files, most of it weights
    peak_resident: int  # counts the weights once for every graph that maps them

    @classmethod
    def now(cls) -> Memory:
        fields = {}
        for name in ("smaps_rollup", "status"):
            for line in Path("/proc/self", name).read_text().splitlines()[1:]:
                key, value = line.split(":", 1)
                fields[key] = value.split()
        return cls(*(int(fields[key][0]) * 1024 for key in ("Pss_Anon", "Pss_File", "VmHWM")))


def read(session: Session, ids: list[int], checkpoint: int) -> tuple[float, Memory]:
    """Reads all ids with a progress bar -> seconds, and the memory once `checkpoint` tokens are read.

    Before it, every graph runs until it has fused twice, as a graph takes its working memory in its first runs.
    """
    manifest = session.model.manifest
    block, buffer = manifest.cache.block_size, manifest.cache.buffer
    widths = [graph.tokens for graph in manifest.graphs if graph.kind == "decoder" and graph.tokens < block]
    warm_up = [width for width in widths for _ in range(2 * (buffer // width + 1))]
    start = time.perf_counter()
    with tqdm(total=len(ids), desc="reading", unit=" tokens", file=sys.stdout) as bar:

        def advance(count: int) -> None:
            session.prefill(ids[bar.n : bar.n + count])
            bar.update(count)

        while (left := checkpoint - sum(warm_up) - bar.n) > 0:
            advance(min(block, left))
        for width in warm_up:
            advance(width)
        memory = Memory.now()
        while bar.n < len(ids):
            advance(min(block, len(ids) - bar.n))
    return time.perf_counter() - start, memory


def write(llm: LLM, session: Session, params: SamplingParams) -> tuple[float, int]:
    """Streams what the model writes -> seconds, and tokens sampled."""
    before, start = session.position, time.perf_counter()
    for piece in llm.generate_stream("", params, session=session):
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
    parser.add_argument("--bundle", type=Path, default=CACHE / "bundles" / "smollm2-135m-lococo-128")
    parser.add_argument("--text", type=Path, default=CACHE / "texts" / "persuasion.txt", help="UTF-8 text to read")
    # with what is written, just under the 8,192 positions that SmolLM2 was trained for
    parser.add_argument("--tokens", type=int, default=8016, help="how much of it (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=72, help="how much to write (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--question", default="What is this text about?", help="asked about the text, after it")
    args = parser.parse_args()

    with LLM(args.bundle) as llm, llm.model.session() as session:
        model, cache, dtype = llm.model.manifest.model, llm.model.manifest.cache, llm.model.manifest.dtype
        ids = llm.tokenizer.encode(args.text.read_text(encoding="utf-8")).ids[: args.tokens]
        if len(ids) < CHECKPOINT:
            parser.error(f"expected a text of at least {CHECKPOINT:,} tokens, got {len(ids):,}")
        print(f"{args.text.name}: {len(ids):,} tokens through {cache.mem_size} slots, policy {cache.policy}, {dtype}")

        read_s, early = read(session, ids, CHECKPOINT)
        print(f"\n...{llm.tokenizer.decode(ids[-60:])}", end=" [the model goes on:]")
        params = SamplingParams(args.temperature, top_p=0.9, seed=args.seed, max_tokens=args.max_tokens)
        write_s, written = write(llm, session, params)
        ask(llm, session, args.question, SamplingParams(max_tokens=args.max_tokens))
        late = Memory.now()

        slot_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[dtype]
        full = slot_bytes * session.position
        growth = late.allocated - early.allocated
        verdict = "it did not grow" if growth < MIB else f"it grew by {_mib(growth)}"
        print(f"""\
read     {len(ids):,} tokens in {read_s:.1f} s, {len(ids) / read_s:.0f} tokens/s
wrote    {written:,} tokens in {write_s:.1f} s, {written / write_s:.1f} tokens/s
state    {session.state_bytes:,} bytes at any position; a full cache at {session.position:,}: {full:,} bytes
memory   {_mib(early.allocated)} allocated after {CHECKPOINT:,} tokens, {_mib(late.allocated)} at the end: {verdict}
         beside {_mib(late.mapped)} of mapped files, most of it weights
peak     {_mib(late.peak_resident)} resident (VmHWM), which counts the weights once for each graph that maps them""")


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
