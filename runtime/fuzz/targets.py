"""Fuzz targets in Python: what reads lococo.json, engines.json and the files of fusion heads.

A target takes bytes. It may raise nothing but LococoError, which it catches: anything else is a finding, and so is a
document that is accepted although it does not survive being written and read again. `python targets.py NAME
[libFuzzer options] [FOLDER...]` runs one under atheris, from its corpus on; the tests use `mutations` of the corpus.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MANIFEST = HERE.parent / "tests/data/lococo.json"
if __name__ == "__main__":
    import atheris

    guard: Any = atheris.instrument_imports(include=["lococo_runtime", "lococo_export", "lococo_engines", "json"])
else:
    guard = contextlib.nullcontext()
with guard:
    from lococo_engines.metadata import Engines
    from lococo_runtime import LococoError
    from lococo_runtime.bundle import Manifest, read_manifest

    from lococo_export.checkpoints import HEADS_CONFIG_NAME, HEADS_NAME, load_checkpoint

# a model of one layer: (name, shape) of its tensors, which are all zero
MODEL = {
    "model_type": "llama",
    "vocab_size": 3,
    "hidden_size": 4,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "tie_word_embeddings": True,
}
LAYER = {
    "input_layernorm": [4],
    "post_attention_layernorm": [4],
    "self_attn.q_proj": [4, 4],
    "self_attn.k_proj": [2, 4],
    "self_attn.v_proj": [2, 4],
    "self_attn.o_proj": [4, 4],
    "mlp.gate_proj": [2, 4],
    "mlp.up_proj": [2, 4],
    "mlp.down_proj": [4, 2],
}
SHAPES = {"model.embed_tokens.weight": [3, 4], "model.norm.weight": [4]} | {
    f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()
}


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    """The file format: the header's length, the header, the data."""
    return struct.pack("<Q", len(header)) + header + data


@functools.cache
def directory() -> Path:
    """A folder that goes with the process, with the model in `model/` and an empty `bundle/`."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk takes milliseconds to replace a file
    made = tempfile.TemporaryDirectory(prefix="lococo-fuzz-", dir=memory)
    root = Path(made.name)
    directory.keep = made  # type: ignore[attr-defined]
    (root / "bundle").mkdir()
    (root / "model").mkdir()
    (root / "model/config.json").write_text(json.dumps(MODEL))
    header, end = {}, 0
    for name, shape in SHAPES.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    (root / "model/model.safetensors").write_bytes(safetensors_bytes(json.dumps(header).encode(), bytes(end)))
    return root


def heads(data: bytes) -> bool:
    """Three parts with 0 bytes between: lococo_config.json, and header and data of lococo_heads.safetensors.

    Without a third part the second is the whole file. Returns whether it was accepted, as every target does.
    """
    config, _, rest = data.partition(b"\0")
    header, parted, tensors = rest.partition(b"\0")
    model = directory() / "model"
    (model / HEADS_CONFIG_NAME).write_bytes(config)
    (model / HEADS_NAME).write_bytes(safetensors_bytes(header, tensors) if parted and header[:1] == b"{" else rest)
    try:
        checkpoint = load_checkpoint(model)
    except LococoError:
        return False
    assert all(len(head.convs) == checkpoint.config.num_conv_layers for head in checkpoint.heads)  # noqa: S101
    return True


def model_config(data: bytes) -> bool:
    """config.json of a checkpoint."""
    root = directory() / "plain"
    root.mkdir(exist_ok=True)
    if not (root / "model.safetensors").exists():
        (root / "model.safetensors").symlink_to(directory() / "model/model.safetensors")
    (root / "config.json").write_bytes(data)
    try:
        load_checkpoint(root, policy="h2o", mem_size=4)
    except LococoError:
        return False
    return True


def python_manifest(data: bytes) -> bool:
    """lococo.json as Python reads it. "BUNDLE_ID" in it stands for the right one, once that can be computed."""
    path = directory() / "bundle/lococo.json"
    path.write_bytes(data)
    try:
        if b"BUNDLE_ID" in data:
            path.write_bytes(data.replace(b"BUNDLE_ID", bundle_id(data).encode()))
        manifest = read_manifest(path.parent)
        assert Manifest.from_json(manifest.to_json()) == manifest  # noqa: S101
        sum(t.nbytes for g in manifest.graphs for t in (*g.inputs, *g.outputs))
    except LococoError:
        return False
    return True


def bundle_id(data: bytes) -> str:
    """What from_json compares with."""
    ids = []

    class Recorder(Manifest):
        @property
        def bundle_id(self) -> str:
            ids.append(super().bundle_id)
            return ids[-1]

    with contextlib.suppress(LococoError):
        Recorder.from_json(data.decode("utf-8", "replace"))
    return ids[0] if ids else ""


def python_engines(data: bytes) -> bool:
    """engines.json as Python reads it."""
    try:
        engines = Engines.from_json(data.decode("utf-8", "replace"))
        assert Engines.from_json(engines.to_json()) == engines  # noqa: S101
    except LococoError:
        return False
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "heads": heads,
    "model_config": model_config,
    "python_manifest": python_manifest,
    "python_engines": python_engines,
}


def corpus(name: str) -> dict[str, bytes]:
    """The committed inputs of a target, the manifest of the C tests among them."""
    folder = HERE / "corpus" / name
    inputs = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}
    if name == "python_manifest":
        data = MANIFEST.read_bytes()
        inputs["lococo.json"] = data.replace(json.loads(data)["bundle_id"].encode(), b"BUNDLE_ID")
    return inputs


def mutations(inputs: list[bytes], count: int, seed: int = 1) -> Iterator[bytes]:
    """Inputs with one to four small damages each, the same for the same seed."""
    draw = random.Random(seed)
    pieces = [b"-1", b"1e999", b"NaN", b"null", b"[]", b'""', b"true", b"[" * 3000, b"9" * 5000, b'"\\ud800"', b"\xff"]
    for i in range(count):
        data = bytearray(inputs[i % len(inputs)])
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(data) + 1), draw.randint(1, 32)
            kind = draw.randrange(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at : at + length]
            elif kind == 2:
                data[at:at] = data[at : at + length]
            elif kind == 3:
                data[at : at + draw.randint(0, 8)] = draw.choice(pieces)
            elif kind == 4:
                other = draw.choice(inputs)
                start = draw.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + length]
            else:  # a JSON value
                start = data.find(b":", at) + 1
                end = min((e for e in (data.find(b",", start), data.find(b"}", start)) if e >= 0), default=len(data))
                data[start:end] = draw.choice(pieces)
        yield bytes(data)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    target = TARGETS[name]
    seeds = directory() / "seeds"
    seeds.mkdir()
    for file, content in corpus(name).items():
        (seeds / file).write_bytes(content)

    def run(data: bytes) -> None:
        target(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:  # what knows nothing of JSON rarely leaves it whole
            return next(mutations([data], 1, seed))[:max_size]
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated

    atheris.Setup([*sys.argv, str(seeds)], run, custom_mutator=mutate)
    atheris.Fuzz()
