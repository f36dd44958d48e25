"""lococo.h as reference pages: a Sphinx directive, and `read_header`, which tests use to find undocumented names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clang.cindex as clang
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

# The wheel of libclang brings no headers; these are all that lococo.h includes.
SYSTEM_HEADERS = [
    ("/include/stddef.h", "typedef unsigned long size_t;"),
    (
        "/include/stdint.h",
        "typedef signed char int8_t; typedef unsigned char uint8_t; typedef int int32_t; typedef unsigned uint32_t;"
        "typedef long int64_t; typedef unsigned long uint64_t;",
    ),
]
KINDS = {
    clang.CursorKind.FUNCTION_DECL: "function",
    clang.CursorKind.TYPEDEF_DECL: "type",
    clang.CursorKind.STRUCT_DECL: "struct",
    clang.CursorKind.ENUM_DECL: "enum",
    clang.CursorKind.FIELD_DECL: "member",
    clang.CursorKind.ENUM_CONSTANT_DECL: "enumerator",
}


@dataclass
class Entry:
    """A public name with its comment, "" if it has none."""

    kind: str
    name: str
    declaration: str
    text: str
    line: int
    members: list[Entry] = field(default_factory=list)


def comment_text(raw: str | None) -> str:
    """The words of a comment, its lines joined; what divides the header into sections is no comment of a name."""
    text = re.sub(r"^\s*\*( |$)", "", re.sub(r"^/\*|\*/$", "", raw or ""), flags=re.MULTILINE)
    return "" if text.strip().startswith("---") else " ".join(text.split())


def read_header(path: Path) -> list[Entry]:
    """Every public name of a C header, in its order."""
    unit = clang.Index.create().parse(
        str(path),
        args=["-xc", "-std=c11", "-nostdinc", "-I/include", "-fparse-all-comments"],
        unsaved_files=SYSTEM_HEADERS,
        options=clang.TranslationUnit.PARSE_SKIP_FUNCTION_BODIES,
    )
    problems = [d.spelling for d in unit.diagnostics if d.severity >= clang.Diagnostic.Error]
    if problems:
        raise ValueError(f"{path}: {problems}")
    source = path.read_bytes()

    def entry(cursor: Any) -> Entry:
        start, end = cursor.extent.start.offset, cursor.extent.end.offset
        declaration = " ".join(source[start:end].decode().split()).removeprefix("LOCOCO_API ")
        # clang gives a comment behind a declaration to members only
        behind = re.match(rb";[ ]*(/\*.*?\*/)", source[end:], re.DOTALL)
        text = comment_text(cursor.raw_comment) or comment_text(behind[1].decode() if behind else None)
        return Entry(KINDS[cursor.kind], cursor.spelling, declaration, text, cursor.location.line)

    entries = {e.name: e for e in macros(source.decode())}
    for cursor in unit.cursor.get_children():
        if cursor.location.file is None or cursor.location.file.name != str(path) or cursor.kind not in KINDS:
            continue
        found = entry(cursor)
        if found.kind in ("struct", "enum"):
            found.members = [entry(c) for c in cursor.get_children() if c.kind in KINDS]
        known = entries.setdefault(found.name, found)
        known.text = known.text or found.text  # of `typedef struct x {...} x;` either may hold the comment
    return sorted(entries.values(), key=lambda e: e.line)


def macros(source: str) -> Iterator[Entry]:
    """Macros that define something, less those that end in an underscore; consecutive lines share a comment."""
    comment, last = "", -1
    for match in re.finditer(
        r"(/\*(?:[^*]|\*(?!/))*\*/)\n(?=#define)|^#define (LOCOCO_\w*[^_\W])\b(.+)$", source, re.M
    ):
        line = source.count("\n", 0, match.start()) + 1
        if match[1]:
            comment, last = comment_text(match[1]), line + match[1].count("\n")
        else:
            if line > last + 1:
                comment = ""
            last = line
            trailing = re.search(r"/\*.*\*/", match[3])
            yield Entry("macro", match[2], match[2], comment_text(trailing[0]) if trailing else comment, line)


def sections(path: Path) -> list[tuple[int, str]]:
    """(line, title) of the header's sections."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [(i, re.fullmatch(r"/\* --- (.+?) -+ \*/", line)) for i, line in enumerate(lines, start=1)]
    return [(1, "versions, handles and structs"), *((i, m[1]) for i, m in found if m)]


def preamble(path: Path) -> str:
    """The comment at the top of the header."""
    match = re.match(r"/\*(.*?)\*/", path.read_text(encoding="utf-8"), re.DOTALL)
    return "" if match is None else re.sub(r"^ \* ?", "", match[1], flags=re.MULTILINE).strip()


def to_rst(path: Path) -> list[str]:
    """The reference in Sphinx's C domain."""
    lines = ["::", "", *(f"   {line}" for line in preamble(path).splitlines()), ""]
    entries, starts = read_header(path), sections(path)
    for (start, title), (end, _) in zip(starts, [*starts[1:], (10**9, "")], strict=True):
        lines += [f".. rubric:: {title[0].upper()}{title[1:]}", ""]
        for e in entries:
            if start <= e.line < end:
                lines += directive(e, "")
                for member in e.members:
                    lines += directive(member, "   ")
    return lines


def directive(e: Entry, indent: str) -> list[str]:
    declaration = e.declaration if e.kind in ("function", "member", "type") else e.name
    if e.kind == "struct" and not e.members:
        declaration = e.name  # opaque
    text = re.sub(r"([*`|\\_])", r"\\\1", e.text)
    return [f"{indent}.. c:{e.kind}:: {declaration.removeprefix('typedef ')}", "", f"{indent}   {text}", ""]


class CHeader(SphinxDirective):
    """`c-header:: PATH`, relative to the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = (Path(self.env.doc2path(self.env.docname)).parent / self.arguments[0]).resolve()
        self.env.note_dependency(str(path))
        parent = nodes.section()
        nested_parse_with_titles(self.state, StringList(to_rst(path), path.name), parent)
        return list(parent.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("c-header", CHeader)
    return {"parallel_read_safe": True}
