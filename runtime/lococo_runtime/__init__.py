"""Runs lococo bundles: numpy and the standard library over our C library.

`Session` appends tokens and reads logits; `LLM` adds text; `Model` shares weights between sessions; `Batch` steps them
together; `SessionPool` keeps many of them, most on disk.
"""

from ._exceptions import (
    BackendError,
    BusyError,
    CancelledError,
    ChatTemplateError,
    CheckpointError,
    ClosedError,
    ConfigError,
    CorruptError,
    DeadSessionError,
    EmptyPromptError,
    GrammarError,
    InternalError,
    InvalidArgumentError,
    LococoError,
    NoSpaceError,
    NotFoundError,
    OutOfMemoryError,
    PoolFullError,
    StateMismatchError,
    StorageError,
    TargetExistsError,
    TokenIdError,
    UnsupportedError,
    UnsupportedModelError,
    VerificationError,
    VersionError,
)
from .batch import Batch, BatchOutput, generate_many
from .bundle import LococoConfig, Manifest, read_manifest
from .chat import Chat
from .completion import AsyncCompletionStream, CompletionBuilder, CompletionChunk, CompletionOutput, CompletionStream
from .grammar import Grammar
from .llm import LLM
from .pool import PooledSession, PoolInfo, SessionPool
from .sampling import SamplingParams, StopMatcher, TokenLogprobs
from .session import Model, Session

__all__ = [
    "LLM",
    "AsyncCompletionStream",
    "BackendError",
    "Batch",
    "BatchOutput",
    "BusyError",
    "CancelledError",
    "Chat",
    "ChatTemplateError",
    "CheckpointError",
    "ClosedError",
    "CompletionBuilder",
    "CompletionChunk",
    "CompletionOutput",
    "CompletionStream",
    "ConfigError",
    "CorruptError",
    "DeadSessionError",
    "EmptyPromptError",
    "Grammar",
    "GrammarError",
    "InternalError",
    "InvalidArgumentError",
    "LococoConfig",
    "LococoError",
    "Manifest",
    "Model",
    "NoSpaceError",
    "NotFoundError",
    "OutOfMemoryError",
    "PoolFullError",
    "PoolInfo",
    "PooledSession",
    "SamplingParams",
    "Session",
    "SessionPool",
    "StateMismatchError",
    "StopMatcher",
    "StorageError",
    "TargetExistsError",
    "TokenIdError",
    "TokenLogprobs",
    "UnsupportedError",
    "UnsupportedModelError",
    "VerificationError",
    "VersionError",
    "generate_many",
    "read_manifest",
]
