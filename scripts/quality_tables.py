"""Write the tables of docs/quality.md from the figures that scripts/fit_heads.py left in docs/quality/*/*.json.

Each folder is a run. Text between `<!-- RUN -->` and `<!-- end RUN -->` is replaced; everything else is left alone.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from lococo_calibration.evaluate import paired_difference

DOCS = Path(__file__).resolve().parent.parent / "docs"
BASELINES = ("h2o", "streaming")
SIDE_BY_SIDE = ("first-look", "reported")
"""Runs whose jobs shared the GPU."""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def perplexity(rows: list[dict[str, Any]]) -> str:
    """A line a policy, regime, size of blocks and kind of text; a column a context."""
    contexts = sorted({r["context"] for r in rows})
    several = len({r["block_size"] for r in rows}) > 1

    def key(r: dict[str, Any]) -> tuple[str, str, int, str, str]:
        read = f"blocks of {r['block_size']}" if several and r["regime"] == "block" else r["regime"]
        return r["job"], r["policy"], r["mem_size"], read, r["kind"]

    keys = sorted(dict.fromkeys(map(key, rows)), key=lambda k: (k[4] != "prose", k[2], k[3]))
    found = {(*key(r), r["context"]): r for r in rows}
    lines = []
    for job, policy, m, regime, kind in keys:
        cells = [found.get((job, policy, m, regime, kind, c)) for c in contexts]
        name = policy if job == "baselines" else f"{policy} ({job})"
        figures = [f"{c['perplexity']:.3f}" if c else "" for c in cells]
        lines.append([kind, str(m or "-"), regime, name, *figures])
    return table(["text", "M", "read", "policy", *(f"{c:,}" for c in contexts)], lines)


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Every cell against the better baseline: how much of its gap to the full cache is closed; steps against blocks."""
    at = {(r["policy"], r["mem_size"], r["regime"], r["kind"], r["context"]): r["perplexity"]
          for r in rows if r["job"] == "baselines"}  # fmt: skip
    blocks = {(r["job"], r["kind"], r["context"]): r["perplexity"]
              for r in rows if r["policy"] == "lococo" and r["regime"] == "block"}  # fmt: skip
    lines = []
    for r in rows:
        key = (r["mem_size"], r["regime"], r["kind"], r["context"])
        if r["policy"] != "lococo" or not all((b, *key) in at for b in BASELINES):
            continue
        best = min(at[(b, *key)] for b in BASELINES)
        full = at["full", 0, "block", r["kind"], r["context"]]
        closed = (best - r["perplexity"]) / (best - full)
        verdict = "better than both" if r["perplexity"] < best else "FAILS"
        block = blocks.get((r["job"], r["kind"], r["context"])) if r["regime"] == "step" else None
        lines.append([r["job"], r["kind"], str(r["mem_size"]), r["regime"], f"{r['context']:,}", f"{full:.3f}",
                      f"{best:.3f}", f"{r['perplexity']:.3f}", f"{closed:+.0%}", verdict,
                      f"{r['perplexity'] / block - 1:+.1%}" if block else ""])  # fmt: skip
    lines.sort(key=lambda line: (line[0], line[1] != "prose", line[3], int(line[4].replace(",", ""))))
    head = ["heads", "text", "M", "read", "context", "full", "better baseline", "lococo", "gap closed", "",
            "against blocks"]  # fmt: skip
    return table(head, lines) if lines else ""


def differences(rows: list[dict[str, Any]]) -> str:
    """Every policy of a job against the baselines over many windows, with paired standard errors."""
    at = {(r["policy"], r["mem_size"], r["regime"], r["kind"]): r for r in rows if r["job"] == "baselines"}
    lines: list[list[str]] = []
    for r in sorted(rows, key=lambda r: (r["mem_size"], r["kind"] != "prose", r["regime"])):
        others = [at.get((b, r["mem_size"], r["regime"], r["kind"])) for b in BASELINES]
        if r["job"] == "baselines" or not all(others):
            continue
        cells = ["{:+.2f} % ± {:.2f}".format(*paired_difference(r["window_nll"], o["window_nll"])) for o in others if o]
        windows = f"{len(r['window_nll'])} of {r['context']:,}"
        lines.append([r["job"], r["policy"], r["kind"], str(r["mem_size"]), r["regime"], windows,
                      f"{r['perplexity']:.3f}", *cells])  # fmt: skip
    head = ["heads", "policy", "text", "M", "read", "windows", "perplexity", *(f"against {b}" for b in BASELINES)]
    return table(head, lines) if lines else ""


def passkeys(rows: list[dict[str, Any]]) -> str:
    def key(r: dict[str, Any]) -> tuple[str, int, int, str, str]:
        return r.get("haystack", "filler"), r["context"], r["mem_size"], r["job"], r["policy"]

    lines = []
    for haystack, context, m, job, policy in sorted(set(map(key, rows))):
        mine = [r for r in rows if key(r) == (haystack, context, m, job, policy)]
        depths = [f"{r['correct']}/{r['trials']}" for r in sorted(mine, key=lambda r: r["depth"])]
        name = policy if job == "baselines" else f"{policy} ({job})"
        lines.append([haystack, f"{context:,}", str(m or "-"), name, *depths])
    depths = sorted({r["depth"] for r in rows})
    return table(["among", "context", "M", "policy", *(f"depth {d:g}" for d in depths)], lines)


def ruler(rows: list[dict[str, Any]]) -> str:
    """A line a policy and context; a column a task: the mean share of wanted strings that answers hold."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    keys = list(dict.fromkeys((r["context"], r["mem_size"], r["job"], r["policy"]) for r in rows))
    found = {(r["context"], r["mem_size"], r["job"], r["policy"], r["task"]): r for r in rows}
    lines = []
    for context, m, job, policy in sorted(keys, key=lambda k: k[:2]):
        cells = [found.get((context, m, job, policy, task)) for task in tasks]
        name = policy if job == "baselines" else f"{policy} ({job})"
        scores = [f"{c['score']:.2f}" if c else "" for c in cells]
        mean = f"{sum(c['score'] for c in cells if c) / len(cells):.2f}" if all(cells) else ""
        examples = str(max(c["examples"] for c in cells if c))
        lines.append([f"{context:,}", str(m or "-"), name, *scores, mean, examples])
    return table(["context", "M", "policy", *tasks, "mean", "examples a task"], lines)


def selections(rows: list[dict[str, Any]]) -> str:
    """A line a selection; a column a kind of text and regime."""
    columns = sorted({(r["kind"] != "prose", r["regime"]) for r in rows})
    found = {(r["policy"], r["mem_size"], r["kind"] != "prose", r["regime"]): r["perplexity"] for r in rows}
    lines = []
    for m in sorted({r["mem_size"] for r in rows}):
        for policy in dict.fromkeys(r["policy"] for r in rows if r["mem_size"] == m):
            cells = [found.get((policy, m, *column)) for column in columns]
            lines.append([str(m or "-"), policy, *(f"{c:.3f}" if c else "" for c in cells)])
    return table(["M", "policy", *(f"{'code' if code else 'prose'}, {regime}" for code, regime in columns)], lines)


def long_stretches(rows: list[dict[str, Any]]) -> str:
    """Perplexity between powers of two of tokens."""
    spans = [(0, 8192), (8192, 16384), (16384, 32768), (32768, 65536)]
    lines = []
    for r in sorted(rows, key=lambda r: r["mem_size"]):
        logs = [math.log(x) for x in r["perplexity"]]  # of 4,096 tokens each
        parts = [logs[a // 4096 : b // 4096] for a, b in spans]
        name = r["policy"] if r["job"] == "baselines" else f"{r['policy']} ({r['job']})"
        lines.append([str(r["mem_size"]), name, *(f"{math.exp(sum(p) / len(p)):.2f}" if p else "" for p in parts)])
    return table(["M", "policy", *(f"{a:,} to {b:,}" for a, b in spans)], lines)


def speeds(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        s = r["settings"]
        loss = "next token" if s.get("lm_weight") else "distillation" if s.get("distill_weight") else "reconstruction"
        options = [f"{k}={s[k]}" for k in ("batch", "bptt", "checkpointing", "layers_at_once", "cuda_graphs") if k in s]
        figures = [r["error"].splitlines()[0], ""] if "error" in r else [f"{r['tokens_per_second']:,.0f}",
                                                                         f"{r['peak_gib']:.1f}"]  # fmt: skip
        lines.append([loss, ", ".join(options), *figures])
    return table(["loss", "settings", "tokens/s", "peak GiB"], lines)


def stages(documents: dict[str, Any]) -> str:
    hidden = ("eval_every", "held_out", "steps", "heads_dtype")
    lines = []
    for name, document in documents.items():
        for number, stage in enumerate(document.get("stages", [])):
            settings = ", ".join(f"{k}={v}" for k, v in stage["settings"].items() if k not in hidden)
            cut = document.get("cut_off", "") if number == len(document["stages"]) - 1 else ""
            lines.append([name, str(number), str(stage["settings"]["steps"]), f"{stage['seconds']:.0f}", settings, cut])
    return table(["heads", "stage", "steps", "seconds", "settings other than the defaults", ""], lines)


def run_tables(folder: Path) -> str:
    documents = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    for shared in documents.get("baselines", {}).get("also_from", []):  # runs that measured them on the same windows
        other = json.loads((folder.parent / shared / "baselines.json").read_text(encoding="utf-8"))
        for key in ("perplexity", "passkey", "ruler"):
            mine = documents["baselines"].setdefault(key, [])
            known = {(r["policy"], r["mem_size"], r.get("regime"), r["context"]) for r in mine}
            sizes = {0} | {
                r["mem_size"] for d in documents.values() for r in d.get(key, []) if "sweep" not in d.get("job", {})
            }
            mine += [r for r in other.get(key, []) if r["mem_size"] in sizes
                     and (r["policy"], r["mem_size"], r.get("regime"), r["context"]) not in known]  # fmt: skip

    def rows(key: str) -> list[dict[str, Any]]:
        """Those of the documents that are held out; what a sweep measured is not."""
        sweeps = key == "selections"
        key = "perplexity" if sweeps else key
        chosen = [d for d in documents.values() if ("sweep" in d.get("job", {})) == sweeps or key != "perplexity"]
        return [row for document in chosen for row in document.get(key, [])]

    parts = [f"Device: {', '.join(sorted({d['device'] for d in documents.values() if 'device' in d})) or 'CPU'}."]
    for title, key, render in (
        ("Training speed, alone on the device", "speed", speeds),
        ("Selections without fusion, on training documents", "selections", selections),
        ("Against the better baseline", "perplexity", verdicts),
        ("Perplexity", "perplexity", perplexity),
        ("Over many windows, with standard errors", "every", differences),
        ("Long stretches of prose, read in blocks", "long", long_stretches),
        ("Pass keys found", "passkey", passkeys),
        ("RULER's tasks", "ruler", ruler),
    ):
        if rows(key) and (text := render(rows(key))):
            parts += [f"**{title}.**", text]
    shared_gpu = folder.name in SIDE_BY_SIDE
    note = " (jobs ran side by side, so that seconds are not those of a GPU alone)" if shared_gpu else ""
    if any("stages" in d for d in documents.values()):
        parts += [f"**What was fitted**{note}.", stages(documents)]
    if rows("left_out"):
        parts.append(f"No time was left for: {', '.join(map(str, rows('left_out')))}.")
    unfinished = [name for name, d in documents.items() if "speed" not in d and not d.get("done")]
    if unfinished:
        parts.append(f"Cut off before the end: {', '.join(unfinished)}.")
    return "\n\n".join(parts)


def main() -> None:
    page = DOCS / "quality.md"
    text = page.read_text(encoding="utf-8")
    for folder in sorted(p for p in (DOCS / "quality").iterdir() if p.is_dir()):
        begin, end = f"<!-- {folder.name} -->", f"<!-- end {folder.name} -->"
        if begin not in text:
            raise SystemExit(f"{page}: expected a line {begin}")
        tables = run_tables(folder)
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _, t=tables, b=begin, e=end: f"{b}\n\n{t}\n\n{e}", text, flags=re.S)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
