"""Fits fusion heads for a model, and measures what they are worth.

`Fit` trains heads beside a frozen model (lococo-fit); `window_nll`, `session_nll` and the policies measure
(lococo-eval). docs/fitting.md explains both.
"""

try:
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"{e}; install what this package needs: pip install 'lococo-export[fit]'") from e


from .blocks import FullCache, Fusion, Policy, Streaming
from .data import Corpus, load_corpus
from .evaluate import session_nll, window_nll
from .fit import DivergedError, Fit
from .settings import FitSettings

__all__ = [
    "Corpus",
    "DivergedError",
    "Fit",
    "FitSettings",
    "FullCache",
    "Fusion",
    "Policy",
    "Streaming",
    "load_corpus",
    "session_nll",
    "window_nll",
]
