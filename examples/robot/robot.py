"""A robot that senses for hours in constant memory, and answers questions about it at any time."""

from __future__ import annotations

import argparse
import itertools
import queue
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lococo_runtime import LLM, SamplingParams

ROOMS = ("kitchen", "hall", "garage", "office")


class Memory:
    """What a robot has sensed: one session, as large after three million lines as after three.

    Args:
        llm: the bundle.
        path: of the state, which is read if it is there.
    """

    def __init__(self, llm: LLM, path: Path) -> None:
        self._llm, self._path = llm, path
        self.session = llm.model.session()
        if path.exists():
            self.session.load(path)
        else:
            self.sense("The robot's log:")

    def sense(self, line: str) -> None:
        """Reads what a sensor says."""
        self._llm.read(f"{line}\n", self.session)

    def ask(self, question: str) -> str:
        """Answers from a copy of the session, so that a question leaves no trace in what was sensed."""
        with self.session.clone() as fork:
            prompt = f"\nQuestion: {question}\nAnswer:"
            return self._llm.generate(prompt, SamplingParams(max_tokens=40, stop=["\n"]), session=fork).text.strip()

    def save(self) -> None:
        """Writes the state, whole or not at all: after a power cut it is the last one that was saved."""
        self.session.save(self._path)


def simulate(interval: float) -> Iterator[str]:
    """A line now and then, from a robot that drives around."""
    rng = random.Random(0)
    for minute in itertools.count():
        clock = f"{8 + minute // 60 % 12:02d}:{minute % 60:02d}"
        yield f"{clock} The robot is in the {rng.choice(ROOMS)}. Battery {100 - minute // 5 % 90}%."
        time.sleep(interval)


def feed(events: queue.Queue[tuple[str, str | None]], source: str, lines: Iterable[str]) -> None:
    """Puts lines in the queue, then None. Where it is full they wait outside, so that a question waits for none."""
    for line in lines:
        events.put((source, line.strip()))
    events.put((source, None))


def report(memory: Memory) -> str:
    """Where the robot stands; memory is what the process has for itself, without the mapped weights."""
    session = memory.session
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())  # of Linux
    kib = int(match[1]) if match else 0
    return (
        f"position {session.position:,}, {session.live_slots} slots, state {session.state_bytes:,} bytes,"
        f" memory {kib / 1024:.0f} MiB"
    )


def main() -> None:
    """Senses until there is nothing more to sense or ask; Ctrl-C and SIGTERM end it too, and the state is saved."""
    parser = argparse.ArgumentParser(description="Read sensors from a file or a pipe; answer questions from stdin.")
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export")
    parser.add_argument("--sensors", type=Path, help="where lines of text come from (default: simulated)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between simulated lines (1)")
    parser.add_argument("--state", type=Path, default=Path("robot.lococo"), help="where the state is kept")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between two saves (300)")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    events: queue.Queue[tuple[str, str | None]] = queue.Queue(maxsize=1)
    with LLM(args.bundle) as llm:
        memory = Memory(llm, args.state)
        sensors = args.sensors.open(encoding="utf-8", errors="replace") if args.sensors else simulate(args.interval)
        for source, lines in (("sensors", sensors), ("questions", sys.stdin)):
            threading.Thread(target=feed, args=(events, source, lines), daemon=True).start()
        open_sources, next_save = 2, time.monotonic() + args.save_every
        try:
            while open_sources:
                source, line = events.get()
                if line is None:
                    open_sources -= 1
                elif source == "sensors":
                    memory.sense(line)
                elif line:
                    print(f"{line}\n> {memory.ask(line)}", flush=True)
                if time.monotonic() >= next_save:
                    memory.save()
                    print(report(memory), file=sys.stderr)
                    next_save = time.monotonic() + args.save_every
        except KeyboardInterrupt:
            pass
        memory.save()
        print(report(memory), file=sys.stderr)


if __name__ == "__main__":
    main()
