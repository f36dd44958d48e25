"""Fuzzes a lococo-serve process by its own OpenAPI description with schemathesis: python scripts/fuzz_http.py [SECONDS]

It fails on an answer of status 500 or above, on one that the description does not allow, on a request that the one
allows and the other refuses, on an answer that takes a minute, on a traceback in the server's log, and where the
server's memory has grown by more than 64 MiB since a tenth of the time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "runtime" / "fuzz"))

GROWTH_BYTES = 64 << 20
CHECKS = ["--phases=examples,coverage,fuzzing", "--checks=all", "--request-timeout=60", "--warnings=off"]


def schemathesis(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run against the server at `url`."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *CHECKS, *options]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves its notes
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def resident_bytes(pid: int) -> int:
    """Memory of a process that is no file's (RssAnon)."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def main() -> int:
    from targets import make_served_bundle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=int, nargs="?", default=600)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        make_served_bundle(bundle)
        command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", "0", "--max-new-tokens", "8"]
        server = subprocess.Popen([*command, "--body-timeout", "5"], stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None  # noqa: S101  # a pipe
        log: list[str] = []
        for line in server.stderr:
            log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            print("".join(log))
            return 1
        reader = threading.Thread(target=lambda: log.extend(server.stderr or ()))
        reader.start()
        memory: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(seconds / 10):
                memory.append(resident_bytes(server.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            result = schemathesis(found[1], f"--max-time={seconds}", f"--seed={int(time.time())}")
        finally:
            done.set()
            watcher.join()
            server.terminate()
            code = server.wait()
            reader.join()
    print(result.stdout + result.stderr)
    print("memory in MiB:", *(f"{value / 2**20:.0f}" for value in memory))
    grown = bool(memory) and memory[-1] - memory[0] > GROWTH_BYTES
    traces = [line for line in log if "Traceback" in line]
    if traces:
        print("".join(log[-100:]))
    return 1 if result.returncode or code or traces or grown else 0


if __name__ == "__main__":
    sys.exit(main())
