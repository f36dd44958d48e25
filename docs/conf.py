"""Sphinx: scripts/docs builds these pages, with the reference from lococo.h and the docstrings, into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOMS = ("", "engines", "runtime", "calibration", "bench", "server")
sys.path[:0] = [str(DOCS), *(str(DOCS.parent / room) for room in ROOMS)]

project = "lococo-export"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli", "c_header"]
html_theme = "furo"
exclude_patterns = ["benchmarks"]
suppress_warnings = ["myst.xref_missing"]  # links into the sources, for those who read these pages there
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "imported-members": True}
napoleon_google_docstring = True
