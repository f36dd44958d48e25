"""Text for fitting and evaluation: documents kept whole, tokenised once into a cache, cut into windows.

Sources are files or directories of plain text (a file is a document), JSONL (a line is one), Parquet files and
directories that Hugging Face datasets saved (a row is one; both need pyarrow). Windows never cross documents, and the
split between training and evaluation is by document.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lococo_runtime import CorruptError, InvalidArgumentError, NotFoundError, UnsupportedError
from lococo_runtime._exceptions import ConfigError
from lococo_runtime.bundle import sha256_file, storage_error

CACHE_VERSION = 2
MAX_LISTED = 10
BATCH_CHARACTERS = 1 << 22  # documents handed to the tokenizer at once, so that it can use every core
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lococo" / "tokens"

Window = tuple[int, int]
"""A document's number, and the first token of the window in the corpus."""


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, memory-mapped.

    `tokens` holds all documents, one after the other, and `offsets` where each begins and the last one ends; `names`
    are their files, `digests` the sha256 of their texts.
    """

    tokens: npt.NDArray[np.uint32]  # (N,) all documents, one after the other
    offsets: npt.NDArray[np.int64]  # (documents + 1,) first token of each
    names: list[str]
    digests: list[str]  # sha256 of each document's text
    key: str
    """sha256 over the tokenizer and the contents of the files."""
    notes: list[str] = field(default_factory=list)
    """What was left out, for people."""

    def __len__(self) -> int:
        return len(self.names)

    def windows(self, context: int, documents: Sequence[int] | None = None) -> list[Window]:
        """Windows of `context` tokens that lie side by side within each document.

        Raises:
            InvalidArgumentError: no document is that long.
        """
        chosen = range(len(self)) if documents is None else documents
        found = [
            (d, int(start))
            for d in chosen
            for start in range(int(self.offsets[d]), int(self.offsets[d + 1]) - context + 1, context)
        ]
        if not found:
            longest = max((int(self.offsets[d + 1] - self.offsets[d]) for d in chosen), default=0)
            raise InvalidArgumentError(
                f"text: expected a document of at least {context:,} tokens (one window), the longest of {len(chosen)}"
                f" has {longest:,}; give longer documents or lower the context"
            )
        return found

    def read(self, windows: Sequence[Window], context: int) -> npt.NDArray[np.int64]:
        """The tokens of windows, (windows, context)."""
        return np.stack([self.tokens[start : start + context] for _, start in windows]).astype(np.int64)

    def split(self, context: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
        """Documents to train on and documents to evaluate on.

        Among documents that hold a window, a share `held_out` (at least one, if not 0) by a hash of seed and text.
        """
        lengths = np.diff(self.offsets)
        usable = [d for d in range(len(self)) if lengths[d] >= context]
        if held_out == 0:
            return usable, []
        if len(usable) < 2:
            raise InvalidArgumentError(
                f"text: expected at least 2 documents of {context:,} tokens to hold one out, got {len(usable)} of"
                f" {len(self)} documents; give more text, lower --context, or pass --held-out 0"
            )
        order = sorted(usable, key=lambda d: hashlib.sha256(f"{seed}:{self.digests[d]}".encode()).digest())
        count = min(max(1, round(held_out * len(usable))), len(usable) - 1)
        return sorted(order[count:]), sorted(order[:count])


def batch_windows(windows: Sequence[Window], batch: int, index: int, seed: int) -> list[Window]:
    """Batch number `index` of an endless pass over the windows, shuffled anew for every epoch. Depends on nothing else:
    a run that resumes needs no other memory of where it was."""
    numbers = range(index * batch, (index + 1) * batch)
    epochs = range(numbers[0] // len(windows), numbers[-1] // len(windows) + 1)
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(len(windows)) for epoch in epochs}
    return [windows[int(order[i // len(windows)][i % len(windows)])] for i in numbers]


def load_corpus(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: str | os.PathLike[str],
    vocab_size: int,
    *,
    text_field: str = "text",
    skip_undecodable: bool = False,
    cache_dir: Path = DEFAULT_CACHE,
) -> Corpus:
    """Tokenises sources, or maps what an earlier call wrote for the same tokenizer and contents.

    Args:
        sources: files or directories (read recursively, hidden files left out).
        tokenizer: tokenizer.json, or the directory that holds it. No special tokens are added.
        vocab_size: the model's.
        text_field: of JSONL objects and table columns.
        skip_undecodable: leave out files that are not UTF-8 text (noted) instead of refusing them.
        cache_dir: where tokenised corpora are kept.

    Raises:
        NotFoundError: a source or the tokenizer is not there.
        InvalidArgumentError: an empty file, or no text at all.
        CorruptError: not UTF-8 text, malformed JSONL, or a malformed tokenizer.
        ConfigError: the tokenizer does not belong to the model.
        UnsupportedError: tables without pyarrow.
    """
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"{path}: not found; text needs the model's tokenizer.json")
    files = _list_files(sources)
    contents = [[f.name, sha256_file(f)] for f in files]  # the name says how a file is read
    identity = [CACHE_VERSION, sha256_file(path), text_field, skip_undecodable, contents]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    target = cache_dir / key[:32]
    if not (target / "index.json").exists():
        try:
            _tokenise(files, path, target, text_field, skip_undecodable)
        except OSError as e:
            raise e if isinstance(e, NotFoundError) else storage_error(e, target) from e
    index, tokens = _read_cache(target)
    if index["max_token"] >= vocab_size:
        raise ConfigError(
            f"{path}: the text has token {index['max_token']}, but the model's vocabulary is {vocab_size}: a tokenizer"
            " of another model; put the model's own tokenizer.json beside its config.json"
        )
    if 2 * index["vocabulary"] < vocab_size:
        raise ConfigError(
            f"{path}: has {index['vocabulary']} tokens, the model's vocabulary is {vocab_size}: a tokenizer of another"
            " model; put the model's own tokenizer.json beside its config.json"
        )
    if not index["names"]:
        raise InvalidArgumentError(f"text: expected documents, found none with text in {len(files)} file(s)")
    offsets = np.array(index["offsets"], np.int64)
    return Corpus(tokens, offsets, index["names"], index["digests"], key, index["notes"])


def _read_cache(folder: Path) -> tuple[dict[str, Any], npt.NDArray[np.uint32]]:
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        expected = 4 * int(index["offsets"][-1])
        size = (folder / "tokens.bin").stat().st_size
    except (ValueError, KeyError, IndexError, FileNotFoundError) as e:
        raise CorruptError(f"{folder}: not tokenised text: {e}; delete this folder") from e
    if size != expected:
        raise CorruptError(f"{folder}/tokens.bin: expected {expected} bytes, got {size}; delete this folder")
    if not size:
        return index, np.empty(0, np.uint32)  # nothing can be mapped
    return index, np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")


def _list_files(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            below = sorted(p for p in source.rglob("*") if p.is_file())
            found = [p for p in below if not any(part.startswith(".") for part in p.relative_to(source).parts)]
            if any(p.suffix == ".arrow" for p in found):  # a saved dataset; its .json files are not documents
                found = [p for p in found if p.suffix == ".arrow" and not p.name.startswith("cache-")]
            if not found:
                raise InvalidArgumentError(f"{source}: expected files with text, found none")
            files += found
        elif source.is_file():
            if source.stat().st_size == 0:
                raise InvalidArgumentError(f"{source}: the file is empty; expected text")
            files.append(source)
        else:
            raise NotFoundError(f"{source}: not found; expected a file or a directory of text")
    return files


def _documents(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Names and texts."""
    if path.suffix in (".parquet", ".arrow"):
        yield from _table_rows(path, text_field)
        return
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield f"{path.name}:{number}", _json_text(line, f"{path}:{number}", text_field)
        else:
            yield path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise _Undecodable(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from e


class _Undecodable(Exception):
    pass


def _json_text(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise CorruptError(f"{where}: not valid JSON: {e}") from e
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise CorruptError(
            f'{where}: expected an object with a string "{text_field}"; name the field with --text-field'
        )
    return text


def _table_rows(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        raise UnsupportedError(f"{path}: tables need pyarrow: pip install 'lococo-export[fit-all]'") from e
    try:
        if path.suffix == ".parquet":
            batches: Any = pq.ParquetFile(path).iter_batches(64)
        else:
            batches = iter(pa.ipc.open_stream(str(path)))
        row = 0
        for batch in batches:
            if text_field not in batch.schema.names:
                names = ", ".join(batch.schema.names)
                raise CorruptError(f'{path}: no column "{text_field}", only {names}; name it with --text-field')
            for text in batch.column(text_field).to_pylist():
                row += 1
                if not isinstance(text, str | None):
                    raise CorruptError(
                        f'{path}: row {row}: expected strings in the column "{text_field}", got {type(text).__name__};'
                        " name the column with --text-field"
                    )
                if text:
                    yield f"{path.name}:{row}", text
    except pa.ArrowInvalid as e:
        raise CorruptError(f"{path}: not a whole table: {e}") from e


def _tokenise(files: list[Path], tokenizer_file: Path, target: Path, text_field: str, skip_undecodable: bool) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as e:  # tokenizers raises nothing narrower
        raise CorruptError(f"{tokenizer_file}: not a tokenizer: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names: list[str] = []
    digests: list[str] = []
    offsets = [0]
    notes: list[str] = []
    bad: list[str] = []
    max_token = -1
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".tokens.", dir=target.parent))
    try:
        with (staging / "tokens.bin").open("wb") as out:
            for batch in _batches(files, text_field, bad):
                for (name, text), encoded in zip(
                    batch, tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False), strict=True
                ):
                    if not encoded.ids:
                        notes.append(f"{name}: no text")
                        continue
                    ids = np.array(encoded.ids, np.uint32)
                    max_token = max(max_token, int(ids.max()))
                    out.write(ids.tobytes())
                    names.append(name)
                    digests.append(hashlib.sha256(text.encode()).hexdigest())
                    offsets.append(offsets[-1] + len(ids))
        if bad and not skip_undecodable:
            more = f"\n  and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
            listed = "\n  ".join(bad[:MAX_LISTED])
            raise CorruptError(f"{len(bad)} undecodable file(s); --skip-undecodable leaves them out:\n  {listed}{more}")
        index = {
            "max_token": max_token,
            "vocabulary": tokenizer.get_vocab_size(),
            "offsets": offsets,
            "names": names,
            "digests": digests,
            "notes": [*notes, *(f"{b}; left out" for b in bad)],
        }
        (staging / "index.json").write_text(json.dumps(index), encoding="utf-8")
        try:
            os.replace(staging, target)
        except OSError:
            if not (target / "index.json").exists():  # or else another run was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _batches(files: list[Path], text_field: str, bad: list[str]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for path in files:
        documents = _documents(path, text_field)
        while True:
            try:
                document = next(documents, None)
            except _Undecodable as e:
                bad.append(str(e))
                break
            if document is None:
                break
            batch.append(document)
            size += len(document[1])
            if size > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
