"""Fits fusion heads for a model, and measures what they are worth."""

from __future__ import annotations
