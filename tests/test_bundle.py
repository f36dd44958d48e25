"""The manifest: exact bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from lococo_runtime import ConfigError, CorruptError, LococoConfig, NotFoundError, VersionError, read_manifest
from lococo_runtime.bundle import (
    FileEntry,
    Manifest,
    ModelGeometry,
    forward_widths,
    graph_specs,
    publish_directory,
)

DOCS = Path(__file__).parents[1] / "docs" / "bundle.md"


def example() -> Manifest:
    """The manifest printed in docs/bundle.md."""
    model = ModelGeometry(
        family="llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope={"type": "default", "theta": 10000.0},
        eos_token_ids=[2],
    )
    cache = LococoConfig.from_rate(32, 0.5, 1)
    specs = graph_specs(model, cache, "float16", 1)
    files = [FileEntry("model.onnx.data", 4096, "ab" * 32), FileEntry("decoder_1.onnx", 1000, "cd" * 32)]
    return Manifest(
        producer="lococo-export 0.1.0",
        model=model,
        cache=cache,
        dtype="float16",
        batch_size=1,
        graphs=specs,
        files=tuple(files),
        tokenizer=None,
        provenance={"source": "tiny", "checkpoint_format": "lococo-merged"},
    )


def test_exact_bytes() -> None:
    """docs/bundle.md prints a manifest in full; it is what the code writes, byte for byte."""
    printed = DOCS.read_text().split("```json\n")[1].split("```")[0]
    assert example().to_json() == printed


def test_round_trip() -> None:
    manifest = example()
    assert Manifest.from_json(manifest.to_json()) == manifest


def edited(change: Any) -> str:
    document = json.loads(example().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.update(schema_version=2), VersionError),
        (lambda d: d.update(schema_version="1"), VersionError),
        (lambda d: d.update(format="zip"), CorruptError),
        (lambda d: d.pop("cache"), CorruptError),
        (lambda d: d["cache"].update(mem_size=0), CorruptError),
        (lambda d: d["cache"].update(mem_size=64), CorruptError),
        (lambda d: d["model"].update(num_layers=2), CorruptError),
        (lambda d: d["state"].update(nbytes=1), CorruptError),
        (lambda d: d.update(dtype="float12"), CorruptError),
        (lambda d: d.update(bundle_id="0" * 64), CorruptError),
        (lambda d: d.update(graphs=None), CorruptError),
        (lambda d: d.update(graphs=[{}]), CorruptError),
    ],
)
def test_edited_manifests_are_refused(change: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Manifest.from_json(edited(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"lococo"'])
def test_other_documents_are_refused(text: str) -> None:
    with pytest.raises(CorruptError):
        Manifest.from_json(text)


def test_reading_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="lococo-export"):
        read_manifest(tmp_path)
    (tmp_path / "lococo.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptError, match="UTF-8"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mem_size": 0}, "mem_size"),
        ({"mem_size": 2.5}, "mem_size"),
        ({"keep": 32}, "no mixed slot"),
        ({"keep": 33}, "keep"),
        ({"keep": -1}, "keep"),
        ({"local_len": 17}, "local_len"),
        ({"local_len": -1}, "local_len"),
        ({"block_size": 0}, "block_size"),
        ({"buffer": -1}, "buffer"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"num_conv_layers": 0}, "num_conv_layers"),
        ({"conv_expand": 0}, "conv_expand"),
        ({"activation": "relu6"}, "activation"),
        ({"policy": "lru"}, "policy"),
        ({"score_decay": 1.1}, "score_decay"),
        ({"score_decay": float("nan")}, "score_decay"),
        ({"decay_per": "layer"}, "decay_per"),
        ({"policy": "h2o"}, "keep"),
    ],
    ids=str,
)
def test_config_names_the_field(changes: dict[str, Any], field: str) -> None:
    good = LococoConfig(mem_size=32, keep=16, block_size=32)
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(good, **changes)


def test_keep_rate_truncates_as_published() -> None:
    assert LococoConfig.from_rate(512, 0.5, 512).num_mixed == 256
    assert LococoConfig.from_rate(10, 0.75, 8).num_mixed == 2
    with pytest.raises(ConfigError, match="truncated"):  # 10 * (1 - 0.9) is just below 1
        LococoConfig.from_rate(10, 0.9, 8)
    with pytest.raises(ConfigError, match="hh_keep_rate"):
        LococoConfig.from_rate(10, 1.5, 8)


def test_h2o_is_half_and_half() -> None:
    config = LococoConfig.h2o(256, 128)
    assert (config.keep, config.local_len, config.num_mixed, config.score_decay) == (256, 128, 0, 1.0)


@pytest.mark.parametrize(("block", "widths"), [(1, (1,)), (7, (1, 7)), (32, (1, 32)), (512, (1, 32, 512))])
def test_forward_widths(block: int, widths: tuple[int, ...]) -> None:
    assert forward_widths(block) == widths


def test_publishing_removes_what_failed(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with publish_directory(tmp_path / "b") as staging:
            (staging / "file").write_text("x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
