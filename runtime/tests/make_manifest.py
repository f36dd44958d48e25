"""Writes data/lococo.json, the manifest that test_manifest.cc starts from, as the exporter would write it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from lococo_runtime.bundle import FileEntry, LococoConfig, Manifest, ModelGeometry, graph_specs  # noqa: E402

MODEL = ModelGeometry(
    family="llama",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    rms_norm_eps=1e-05,
    rope={"type": "default", "theta": 10000.0, "note": 'é 😀 "\\\x7f\n'},  # text that JSON can write in several ways
    eos_token_ids=[2, 3],
)
CACHE = LococoConfig.from_rate(4, 0.5, 3, kernel_size=3, buffer=2, score_decay=0.25)


def entry(path: str) -> FileEntry:
    """A file that holds its own path."""
    content = path.encode()
    return FileEntry(path, len(content), hashlib.sha256(content).hexdigest())


def main() -> None:
    graphs = graph_specs(MODEL, CACHE, "float16", 2)
    files = [*(entry(g.file) for g in graphs), entry("model.onnx.data"), entry("tokenizer/tokenizer.json")]
    manifest = Manifest("test", MODEL, CACHE, "float16", 1, graphs, tuple(files), None, {})
    (HERE / "data" / "lococo.json").write_text(manifest.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
