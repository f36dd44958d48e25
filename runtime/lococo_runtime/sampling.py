"""How tokens are chosen, and where a text ends: the Python side of the sampler and of stop strings."""

from __future__ import annotations

import ctypes
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from . import _c_api as c
from ._exceptions import InvalidArgumentError

MAX_STOPS = 64  # LOCOCO_MAX_STOPS
MAX_STOP_BYTES = 1024  # LOCOCO_MAX_STOP_BYTES
MAX_FLOAT32 = 3.4028234e38

_T = TypeVar("_T")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and where generation ends. All defaults: greedy, 128 tokens.

    The C core applies, in transformers' order: logit_bias, repetition_penalty, frequency_penalty, presence_penalty,
    temperature, top_k, top_p, min_p, typical_p. docs/sampling.md defines each. The same seed gives the same tokens,
    because a draw depends on the probabilities, the seed and the absolute position alone.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens and ties with the last of them; 0 keeps all.
        top_p: keep the likeliest tokens that together reach top_p; 1 keeps all.
        seed: of the draws, below 2^64.
        max_tokens: the most tokens to generate.
        ignore_eos: do not end after an end-of-sequence token.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        typical_p: locally typical sampling (arXiv 2202.00666); 1 keeps all.
        repetition_penalty: of every token read, prompts included (CTRL, arXiv 1909.05858); 1 changes nothing.
        presence_penalty: subtracted from the logits of generated tokens.
        frequency_penalty: the same, times how often each was generated.
        logit_bias: token id -> number added to its logit.
        stop: strings that end the text; neither they nor what follows come out.
        stop_token_ids: tokens that end generation as end-of-sequence tokens do.
        logprobs: give log-probabilities of every token and of this many likeliest; None gives none.

    Raises:
        InvalidArgumentError: a value of the wrong kind or out of range, named. Token ids are held against the
            vocabulary when they are used.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    ignore_eos: bool = False
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _copy_of("stop", self.stop, tuple, "a string or a list")
        for name, value in (
            ("stop", stop),
            ("stop_token_ids", _copy_of("stop_token_ids", self.stop_token_ids, tuple, "a list of token ids")),
            ("logit_bias", _copy_of("logit_bias", self.logit_bias, dict, "a dict of token ids and numbers")),
        ):
            object.__setattr__(self, name, value)
        if not isinstance(self.ignore_eos, (bool, np.bool_)):
            raise InvalidArgumentError(f"ignore_eos: expected True or False, got {self.ignore_eos!r}")
        check_integer("max_tokens", self.max_tokens, 2**31 - 1)
        check_integer("seed", self.seed, 2**64 - 1)
        check_integer("top_k", self.top_k, 2**31 - 1)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 2**31 - 1)
        _check_number("temperature", self.temperature, low=0)
        _check_number("top_p", self.top_p, above=0, high=1)
        _check_number("min_p", self.min_p, low=0, high=1)
        _check_number("typical_p", self.typical_p, above=0, high=1)
        _check_number("repetition_penalty", self.repetition_penalty, above=0)
        _check_number("presence_penalty", self.presence_penalty)
        _check_number("frequency_penalty", self.frequency_penalty)
        for token_id, bias in self.logit_bias.items():
            check_integer("logit_bias: token id", token_id, 2**31 - 1)
            _check_number(f"logit_bias[{token_id}]", bias)
        for token_id in self.stop_token_ids:
            check_integer("stop_token_ids", token_id, 2**31 - 1)
        _check_stop(stop)

    def to_c(self) -> c.CSamplingParams:
        """The C struct, which keeps the arrays that it points to."""
        stops, biases = self.stop_token_ids, self.logit_bias
        return c.CSamplingParams(
            struct_size=ctypes.sizeof(c.CSamplingParams),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias_ids=(ctypes.c_int32 * len(biases))(*biases.keys()),
            logit_bias_values=(ctypes.c_float * len(biases))(*biases.values()),
            num_logit_bias=len(biases),
            stop_token_ids=(ctypes.c_int32 * len(stops))(*stops),
            num_stop_token_ids=len(stops),
            ignore_eos=self.ignore_eos,
        )


def or_default(params: SamplingParams | None) -> SamplingParams:
    """`params`, the default for None. Raises InvalidArgumentError where it is something else."""
    if not isinstance(params, SamplingParams | None):
        raise InvalidArgumentError(f"params: expected SamplingParams, got {type(params).__name__}")
    return SamplingParams() if params is None else params


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities after the tokens read so far: of one token, and of the likeliest ones.

    token_id: the token; logprob: its own. top: token id -> log-probability, likeliest first, the lower id on a tie.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


class StopMatcher:
    """Ends a text at the first of some strings, however the text is cut into pieces.

    What could still become a stop string is held back until that is decided, and nothing else is. Of several strings
    the one that is complete first ends the text; of those that end together, the longest.

    Args:
        stop: the strings.

    Raises:
        InvalidArgumentError: too many strings, or one that is empty or too long.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._handle = ctypes.c_void_p()
        self.stop = tuple(stop)
        self.matched: str | None = None
        """The string that ended the text, or None."""
        _check_stop(self.stop)
        encoded = (ctypes.c_char_p * len(self.stop))(*(s.encode() for s in self.stop))
        c.call("lococo_stops_create", encoded, len(self.stop), ctypes.byref(self._handle))

    def push(self, text: str) -> str:
        """Takes the next piece and returns what may be shown now; after a match, `matched` says which.

        Raises:
            InvalidArgumentError: the text has ended.
        """
        data = text.encode()
        matched = ctypes.c_int32()
        shown, size = ctypes.c_void_p(), ctypes.c_size_t()
        out = (ctypes.byref(shown), ctypes.byref(size))
        c.call("lococo_stops_push", self._handle, data, len(data), *out, ctypes.byref(matched))
        if matched.value >= 0:
            self.matched = self.stop[matched.value]
        return _text_at(shown, size)

    def finish(self) -> str:
        """The text ends without a match: returns what was held back. The next `push` begins a new text."""
        shown, size = ctypes.c_void_p(), ctypes.c_size_t()
        c.call("lococo_stops_finish", self._handle, ctypes.byref(shown), ctypes.byref(size))
        self.matched = None
        return _text_at(shown, size)

    def __del__(self) -> None:
        if self._handle:
            c.library().lococo_stops_destroy(self._handle)
            self._handle = ctypes.c_void_p()


def _text_at(address: ctypes.c_void_p, size: ctypes.c_size_t) -> str:
    return ctypes.string_at(address, size.value).decode() if size.value else ""


def _copy_of(name: str, value: Any, kind: Callable[[Any], _T], expected: str) -> _T:
    try:
        return kind(value)
    except (TypeError, ValueError) as e:
        raise InvalidArgumentError(f"{name}: expected {expected}, got {value!r}") from e


def check_integer(name: str, value: object, high: int) -> None:
    """Raises InvalidArgumentError unless `value` is an integer from 0 to `high`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InvalidArgumentError(f"{name}: expected an integer, got {value!r}")
    if not 0 <= int(value) <= high:
        raise InvalidArgumentError(f"{name}: expected 0 to {high}, got {value}")


def _check_number(
    name: str, value: object, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InvalidArgumentError(f"{name}: expected a number, got {value!r}")
    if not (abs(value) <= MAX_FLOAT32 and low <= value <= high and above < value):  # type: ignore[operator]
        limits = [f"above {above:g}"] if above > -math.inf else [f"at least {low:g}"] if low > -math.inf else []
        limits += [f"at most {high:g}"] if high < math.inf else []
        finite = " ".join(["a finite number", " and ".join(limits)]).rstrip()
        raise InvalidArgumentError(f"{name}: expected {finite}, got {value}")


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOPS:
        raise InvalidArgumentError(f"stop: expected at most {MAX_STOPS} strings, got {len(stop)}")
    for i, text in enumerate(stop):
        if not isinstance(text, str) or not text:
            raise InvalidArgumentError(f"stop[{i}]: expected some text, got {text!r}")
        lone = any("\ud800" <= character <= "\udfff" for character in text)
        if lone or "\0" in text or len(text.encode()) > MAX_STOP_BYTES:
            raise InvalidArgumentError(f"stop[{i}]: expected at most {MAX_STOP_BYTES} bytes of UTF-8 without NUL")
