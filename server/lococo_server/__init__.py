"""lococo-serve: a bundle behind OpenAI's HTTP interface."""

from .app import create_app
from .engine import Limits

__all__ = ["Limits", "create_app"]
