"""The Python fuzz targets on their corpus and some mutations of it, and what fuzzing has found.

`scripts/fuzz` runs them under atheris, and those in C++, which the C tests replay, under libFuzzer.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from lococo_runtime import ConfigError, CorruptError, LococoConfig
from lococo_runtime.bundle import MAX_JSON_BYTES, Manifest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("fuzz_targets", ROOT / "runtime/fuzz/targets.py")
assert spec is not None
assert spec.loader is not None
targets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(targets)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_corpus_and_mutations(name: str) -> None:
    """Whatever comes in, a target raises nothing: hostile input ends in a LococoError."""
    target, corpus = targets.TARGETS[name], targets.corpus(name)
    accepted = {file for file, data in corpus.items() if target(data)}
    assert accepted, "no input of the corpus is sound: the target tests nothing behind the first check"
    count = sum(target(data) for data in targets.mutations(list(corpus.values()), 400))
    assert 0 < count < 400


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "maximum recursion depth"),
        ("9" * 5000, "digits"),
        ('{"a": NaN}', "not JSON compliant"),
        ('{"a": 1e999}', "not JSON compliant"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (" " * (MAX_JSON_BYTES + 1), "at most 16777216"),
    ],
    ids=["deep", "digits", "nan", "infinity", "surrogate", "long"],
)
def test_documents_that_python_would_take_or_choke_on(text: str, reason: str) -> None:
    with pytest.raises(CorruptError, match=f"not valid JSON: .*{reason}"):
        Manifest.from_json(text)


def edited(change: Any) -> str:
    """The manifest of the corpus, sound but for what `change` does to it."""
    document = json.loads(targets.corpus("python_manifest")["lococo.json"])
    change(document)
    text = json.dumps(document)
    return text.replace("BUNDLE_ID", targets.bundle_id(text.encode()))


def test_manifests_that_fail_later_are_refused() -> None:
    Manifest.from_json(edited(lambda d: None))

    def refused(change: Any) -> None:
        with pytest.raises(CorruptError, match="malformed manifest"):
            Manifest.from_json(edited(change))

    refused(lambda d: d["graphs"][0]["inputs"][0].update(dtype="float8"))
    refused(lambda d: d["graphs"][0]["inputs"][0].update(dtype=[]))
    refused(lambda d: d["graphs"][0]["inputs"][0].update(shape="13"))
    refused(lambda d: d["graphs"][0]["inputs"][0].update(shape=[1, -1]))
    refused(lambda d: d["graphs"][0].update(tokens="1"))
    refused(lambda d: d["files"][0].update(nbytes="1"))
    refused(lambda d: d.update(batch_size=1.0))
    refused(lambda d: d.update(dtype="int64"))
    refused(lambda d: d["model"].update(eos_token_ids=2))
    refused(lambda d: d["model"].update(num_layers=10**9))
    refused(lambda d: d["cache"].update(mem_size=10**12, capacity=10**12))


def test_a_layer_number_of_5000_digits() -> None:
    config, header, data = targets.corpus("heads")["one"].split(b"\0", 2)
    assert not targets.heads(
        b"\0".join([config, header.replace(b"layers.0.n", b"layers." + b"1" * 5000 + b".n"), data])
    )
    assert not targets.heads(b"\0".join([config, header.replace(b"layers.0.n", b"layers.00.n"), data]))


def test_sizes_have_a_limit() -> None:
    with pytest.raises(ConfigError, match="mem_size: expected at most 16777216"):
        LococoConfig(mem_size=2**40, keep=1, block_size=1)
