"""This process's memory, as Linux accounts it."""

from __future__ import annotations

from pathlib import Path


def memory_bytes(field: str) -> int:
    """A size from /proc/self/status in bytes: VmRSS, VmHWM (the peak of VmRSS), RssAnon or RssFile.

    getrusage's ru_maxrss will not do: a child process starts with its parent's peak.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
