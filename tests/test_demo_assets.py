"""What scripts/demo reads: R's lazy-load databases, hard-wrapped prose, and the model made from a GGUF file."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture
def rdata(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import rdata

    return rdata


@pytest.fixture
def fetch_texts(rdata: ModuleType) -> ModuleType:
    import fetch_texts

    return fetch_texts


# --- a writer of R's serialisation, for the tests ---------------------------------------------------------------------


def i4(*values: int) -> bytes:
    return struct.pack(f">{len(values)}i", *values)


def chars(text: str | None) -> bytes:
    data = b"" if text is None else text.encode()
    return i4(0x00040009, -1 if text is None else len(data)) + data


def strings(*texts: str | None) -> bytes:
    return i4(16, len(texts)) + b"".join(map(chars, texts))


SYMBOL_NAMES = i4(1) + chars("names")
REFERENCE_1 = i4(0x1FF)  # to the first symbol of the stream


def named_list(tag: bytes, **items: bytes) -> bytes:
    return i4(0x213, len(items)) + b"".join(items.values()) + i4(0x402) + tag + strings(*items) + i4(0xFE)


def integers(*values: int) -> bytes:
    return i4(13, len(values), *values)


def serialised(item: bytes, version: int = 3) -> bytes:
    return b"X\n" + i4(version, 0x040201, 0x030500) + (i4(5) + b"UTF-8" if version == 3 else b"") + item


def write_database(base: Path, compressed: int = 1, **values: bytes) -> None:
    database, offsets = b"", {}
    for name, item in values.items():
        data = serialised(item, version=2)
        chunk = struct.pack(">I", len(data)) + zlib.compress(data)
        offsets[name] = integers(len(database), len(chunk))
        database += chunk
    variables = named_list(SYMBOL_NAMES, **offsets)
    index = named_list(
        REFERENCE_1, variables=variables, references=named_list(REFERENCE_1), compressed=integers(compressed)
    )
    base.with_suffix(".rdb").write_bytes(database)
    base.with_suffix(".rdx").write_bytes(gzip.compress(serialised(index)))


# --- R's lazy-load database -------------------------------------------------------------------------------------------


def test_read_lazy_load(rdata: ModuleType, tmp_path: Path) -> None:
    write_database(
        tmp_path / "Rdata",
        lines=strings("Anne Elliot", "", "café", None),
        numbers=i4(14, 2) + struct.pack(">2d", 0.5, -1e300),
        nested=named_list(SYMBOL_NAMES, a=integers(1, -2), b=i4(0xFE)),
    )
    assert rdata.read_lazy_load(tmp_path / "Rdata") == {
        "lines": ["Anne Elliot", "", "café", None],
        "numbers": [0.5, -1e300],
        "nested": {"a": [1, -2], "b": None},
    }


def test_other_compression_is_refused(rdata: ModuleType, tmp_path: Path) -> None:
    write_database(tmp_path / "Rdata", compressed=3, lines=strings("x"))
    with pytest.raises(rdata.RDataError, match=r"expected zlib compression, \[1\], got \[3\]"):
        rdata.read_lazy_load(tmp_path / "Rdata")


def test_damaged_database_is_refused(rdata: ModuleType, tmp_path: Path) -> None:
    write_database(tmp_path / "Rdata", lines=strings("Anne", "Elliot"))
    database = (tmp_path / "Rdata.rdb").read_bytes()
    (tmp_path / "Rdata.rdb").write_bytes(database[:-6])
    with pytest.raises(rdata.RDataError, match="not a lazy-load database"):
        rdata.read_lazy_load(tmp_path / "Rdata")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A\n" + i4(2, 0, 0), "expected the XDR serialisation"),
        (b"X\n" + i4(4, 0, 0), "expected serialisation version 2 or 3, got 4"),
        (serialised(strings("Anne"))[:-1], "cut short"),
        (serialised(i4(13, -5)), "cut short"),
        (serialised(i4(4, 0)), "R type 4 at .* is not supported"),
    ],
)
def test_bad_serialisations_are_refused(rdata: ModuleType, data: bytes, message: str) -> None:
    with pytest.raises(rdata.RDataError, match=message):
        rdata.deserialize(data)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_unwrap_joins_prose_and_keeps_verse(fetch_texts: ModuleType) -> None:
    lines = [
        "",
        "Chapter 1",
        "",
        "",
        "Sir Walter Elliot, of Kellynch Hall, was a man who,  ",
        "for his own amusement, never took up any book.  He",
        "read these words--",
        '"Married, December 16."',
        "    To Templars modesty,",
        "      to Parsons sense.",
        "And so on.",
    ]
    assert fetch_texts.unwrap(lines) == (
        "Chapter 1\n"
        "\n"
        "Sir Walter Elliot, of Kellynch Hall, was a man who, for his own amusement, never took up any book. He read"
        ' these words--"Married, December 16."\n'
        "    To Templars modesty,\n"
        "      to Parsons sense.\n"
        "And so on.\n"
    )


def test_publish_replaces_whole_files(fetch_texts: ModuleType, tmp_path: Path) -> None:
    for text in ("one\n", "two\n"):
        fetch_texts.publish(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_fetched_model_is_an_ordinary_directory() -> None:
    """Opens with transformers as it is; the tokenizer splits digits singly and knows the chat template."""
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL} is missing: run scripts/fetch_smollm2.py")
    transformers = pytest.importorskip("transformers")
    config: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("1815") == list("1815")
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
