"""lococo-serve: a bundle behind OpenAI's HTTP interface."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"{e}; install what this package needs: pip install 'lococo-export[serve]'") from e

from .app import create_app
from .engine import Limits

__all__ = ["Limits", "create_app"]
