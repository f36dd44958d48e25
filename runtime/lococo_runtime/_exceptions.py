"""Everything this project raises on purpose.

LococoError
├── InvalidArgumentError (ValueError)      a value the caller can correct
│   ├── EmptyPromptError                   nothing to read
│   ├── TokenIdError                       a token id outside the vocabulary
│   ├── ChatTemplateError                  a chat template that is missing, raises, or does not end
│   ├── GrammarError                       a JSON schema or regex that is invalid, unsupported or cannot be satisfied
│   ├── ConfigError                        slot-cache settings that contradict each other or the checkpoint
│   └── UnsupportedModelError              an architecture or option that is not supported; lists what is
├── NotFoundError (FileNotFoundError)      a file, folder or library that is not there
├── CorruptError                           truncated, wrong sha256, malformed, inconsistent
│   └── CheckpointError                    missing, unexpected, wrongly shaped or non-finite tensors, each named
├── VersionError                           a schema or ABI version this release does not know
├── UnsupportedError                       a device, backend or dtype that is not available here
├── StateMismatchError                     a state of another bundle
├── BusyError                              a session, or a pool's directory, in use elsewhere
├── PoolFullError                          every session that the pool's budget allows is acquired
├── CancelledError                         a session stopped by cancel; what it has read stays read
├── ClosedError                            a model or session used after close
├── DeadSessionError                       an earlier backend error left the session unusable
├── StorageError (OSError)                 the operating system refused a read or a write
│   ├── TargetExistsError (FileExistsError)
│   └── NoSpaceError
├── OutOfMemoryError (MemoryError)
├── BackendError                           ONNX Runtime (or another backend) failed
├── VerificationError                      a bundle that disagrees with its reference
└── InternalError                          a defect of this library
"""

from __future__ import annotations


class LococoError(Exception):
    """Base of every error this project raises on purpose."""


class InvalidArgumentError(LococoError, ValueError):
    """A value the caller can correct."""


class EmptyPromptError(InvalidArgumentError):
    """A prompt or a list of token ids with nothing in it."""


class TokenIdError(InvalidArgumentError):
    """A token id outside the vocabulary."""


class ChatTemplateError(InvalidArgumentError):
    """A chat template that is missing, does not compile, raises, or does not end."""


class GrammarError(InvalidArgumentError):
    """A JSON schema or regex that is invalid, unsupported, or cannot be satisfied with this vocabulary."""


class ConfigError(InvalidArgumentError):
    """Slot-cache settings that contradict each other or the checkpoint."""


class UnsupportedModelError(InvalidArgumentError):
    """An architecture or model option that is not supported."""


class NotFoundError(LococoError, FileNotFoundError):
    """A file, folder or library that is not there."""


class CorruptError(LococoError):
    """A file that is truncated, malformed, inconsistent, or has the wrong sha256."""


class CheckpointError(CorruptError):
    """A checkpoint with missing, unexpected, wrongly shaped or non-finite tensors."""


class VersionError(LococoError):
    """A schema or ABI version this release does not know."""


class UnsupportedError(LococoError):
    """A device, backend or dtype that is not available here."""


class StateMismatchError(LococoError):
    """A state file or buffer of another bundle."""


class BusyError(LococoError):
    """A session used from two threads at once, or acquired elsewhere; a pool's directory that another pool has."""


class PoolFullError(LococoError):
    """Every session that the pool's budget allows is acquired."""


class CancelledError(LococoError):
    """A session stopped by `cancel`; what it has read stays read."""


class ClosedError(LococoError):
    """A model or session used after close."""


class DeadSessionError(LococoError):
    """An earlier backend error left the session unusable; reset it or load a state."""


class StorageError(LococoError, OSError):
    """The operating system refused a read or a write."""


class TargetExistsError(StorageError, FileExistsError):
    """The output is already there."""


class NoSpaceError(StorageError):
    """The disk is full."""


class OutOfMemoryError(LococoError, MemoryError):
    """An allocation failed."""


class BackendError(LococoError):
    """ONNX Runtime (or another backend) failed."""


class VerificationError(LococoError):
    """A bundle whose outputs disagree with its reference."""


class InternalError(LococoError):
    """A defect of this library; please report it."""
