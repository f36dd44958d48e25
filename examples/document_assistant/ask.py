"""Questions about a document that is read once: what was kept of it is a memory pack, a file of constant size."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lococo_runtime import LLM, SamplingParams, Session


def read_once(llm: LLM, document: Path, packs: Path) -> Session:
    """A session that has read the document: from its pack, or by reading it now and making the pack.

    A pack belongs to a text and a bundle, so its name is made of both.
    """
    content = document.read_bytes()
    name = hashlib.sha256(llm.model.manifest.bundle_id.encode() + content).hexdigest()
    pack = packs / f"{name}.lococo"
    session = llm.model.session()
    if pack.exists():
        session.load(pack)
    else:
        llm.read(content.decode(), session, progress=show_progress)
        packs.mkdir(parents=True, exist_ok=True)
        session.save(pack)
    return session


def show_progress(done: int, total: int) -> None:
    """A line on stderr that is written over."""
    print(f"\rreading {done:,}/{total:,} tokens", end="\n" if done == total else "", file=sys.stderr)


def ask(llm: LLM, document: Session, question: str) -> Iterator[str]:
    """The answer piece by piece. Every question starts from the pack, not from the question before."""
    with document.clone() as session:
        params = SamplingParams(max_tokens=60, stop=["\n"])
        yield from llm.generate_stream(f"\nQuestion: {question}\nAnswer:", params, session=session)


def main() -> None:
    """Answers the questions of the command line, or lines of stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("document", type=Path, help="a text file")
    parser.add_argument("questions", nargs="*", help="default: lines of stdin")
    parser.add_argument("--packs", type=Path, default=Path("packs"), help="where packs are kept")
    args = parser.parse_args()

    with LLM(args.bundle) as llm:
        start = time.perf_counter()
        document = read_once(llm, args.document, args.packs)
        print(
            f"{args.document.name}: {document.position:,} tokens in {document.state_bytes:,} bytes,"
            f" ready after {time.perf_counter() - start:.2f} s",
            file=sys.stderr,
        )
        for question in args.questions or sys.stdin:
            print(question.strip(), end="\n>")
            for piece in ask(llm, document, question.strip()):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
