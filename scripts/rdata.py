"""Reads the lazy-load database that an installed R package keeps its data in, without R.

`NAME.rdx` is a gzip- or zlib-compressed R object that gives the offset and length of each variable in `NAME.rdb`; a
variable there is its uncompressed length (4 bytes, big-endian), then a zlib stream. Both hold R's binary serialisation
("R Internals", section 1.8), of which this reads the types that plain data is made of.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

NIL_VALUE, REFERENCE = 254, 255
SYMBOL, PAIR_LIST, CHARS, LOGICAL, INTEGER, REAL, STRINGS, LIST = 1, 2, 9, 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10


class RDataError(ValueError):
    """The file is not one that this reader understands."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.references: list[str] = []  # symbols, which later uses name by number

    def take(self, length: int) -> bytes:
        if length < 0 or self.at + length > len(self.data):
            raise RDataError(f"cut short: {length} bytes wanted at {self.at} of {len(self.data)}")
        self.at += length
        return self.data[self.at - length : self.at]

    def int(self) -> int:
        return int.from_bytes(self.take(4), "big", signed=True)

    def header(self) -> None:
        if (magic := self.take(2)) != b"X\n":
            raise RDataError(f"expected the XDR serialisation, which starts with b'X\\n', got {magic!r}")
        version, _, _ = self.int(), self.int(), self.int()
        if version not in (2, 3):
            raise RDataError(f"expected serialisation version 2 or 3, got {version}")
        if version == 3:
            self.take(self.int())  # the native encoding's name

    def item(self) -> Any:
        flags = self.int()
        kind = flags & 0xFF
        if kind == NIL_VALUE:
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8 or self.int()) - 1]
        if kind == SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == PAIR_LIST:
            return self.pair_list(flags)
        if kind == CHARS:
            length = self.int()
            return None if length == -1 else self.take(length).decode("utf-8")  # -1: not available
        length = self.int()
        if kind in (LOGICAL, INTEGER):
            value: Any = list(struct.unpack(f">{length}i", self.take(4 * length)))
        elif kind == REAL:
            value = list(struct.unpack(f">{length}d", self.take(8 * length)))
        elif kind in (STRINGS, LIST):
            value = [self.item() for _ in range(length)]
        else:
            raise RDataError(f"R type {kind} at {self.at} is not supported")
        attributes = self.item() if flags & HAS_ATTRIBUTES else {}
        if kind == LIST and "names" in attributes:
            return dict(zip(attributes["names"], value, strict=True))
        return value

    def pair_list(self, flags: int) -> dict[str, Any]:
        """The tail is one more pair list, or nil."""
        pairs = {}
        while True:
            if flags & HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & HAS_TAG else ""
            pairs[tag] = self.item()
            flags = self.int()
            if flags & 0xFF == NIL_VALUE:
                return pairs
            if flags & 0xFF != PAIR_LIST:
                raise RDataError(f"a pair list continues with R type {flags & 0xFF}")


def deserialize(data: bytes) -> Any:
    """R's binary serialisation -> None, str, or lists of them, of int and of float; a list with names is a dict."""
    reader = _Reader(data)
    reader.header()
    return reader.item()


def read_lazy_load(base: Path) -> dict[str, Any]:
    """All variables of the database `base`.rdx and `base`.rdb, by name."""
    try:
        index = deserialize(zlib.decompress(base.with_suffix(".rdx").read_bytes(), wbits=47))  # 47: gzip or zlib
        if index["compressed"] != [1]:
            raise RDataError(f"{base}.rdx: expected zlib compression, [1], got {index['compressed']}")
        database = base.with_suffix(".rdb").read_bytes()
        values = {}
        for name, (offset, length) in index["variables"].items():
            chunk = database[offset : offset + length]
            data = zlib.decompress(chunk[4:])
            if (expected := int.from_bytes(chunk[:4], "big")) != len(data):
                raise RDataError(f"{base}.rdb: {name}: expected {expected} bytes, got {len(data)}")
            values[name] = deserialize(data)
        return values
    except (zlib.error, KeyError, IndexError, TypeError) as error:
        raise RDataError(f"{base}: not a lazy-load database: {error}") from error
