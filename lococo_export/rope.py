"""Rotary position embedding in float64: frequencies, and tables that stay exact at any position.

RoFormer (arXiv 2104.09864, section 3.4.2) turns channel pair i by position * theta^(-2i/d). A product in float32 loses
the angle long before position 1,048,576, and a table of all positions would end somewhere. So a position is written
in three digits, d0 + 2048 * d1 + 2048^2 * d2, each digit has its own small table of cos and sin, and the three
rotations are composed by complex multiplication, which float32 does to better than 1e-6 rad.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from lococo_runtime._exceptions import ConfigError, UnsupportedModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DIGIT = 2048
"""Base of the digits; the third goes to 511 only, as positions end at 2^31 - 1."""
DIGIT_ENTRIES = (DIGIT, DIGIT, 2**31 // DIGIT**2)

FloatArray = npt.NDArray[np.float64]
Table = npt.NDArray[np.float32]


def _number(rope: dict[str, Any], name: str, default: float | None = None) -> float:
    value = rope.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"rope: {rope.get('type')}: {name}: expected a number above 0, got {value!r}")
    return float(value)


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[FloatArray, float]:
    """Radians per position of every channel pair, (head_dim / 2,) float64, and the factor cos and sin are scaled by.

    `rope` holds `type`, `theta` and what the type needs, under the names that `config.json` uses:

    - "default": theta^(-2i/d) (RoFormer, arXiv 2104.09864, section 3.2.2).
    - "linear": divided by `factor` (Position Interpolation, arXiv 2306.15595).
    - "llama3": `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`; low frequencies
      are divided by the factor, high ones kept, those between interpolated (as published with Llama 3.1).
    - "yarn": `factor`, `original_max_position_embeddings`, and optionally `beta_fast`, `beta_slow`, `truncate`,
      `attention_factor` or `mscale` with `mscale_all_dim` (YaRN, arXiv 2309.00071, sections 3.2 to 3.4).

    Raises:
        UnsupportedModelError: another type, or a rotation of only part of a head.
        ConfigError: a parameter that is missing or no positive number.
    """
    kind = rope.get("type")
    if kind not in ROPE_TYPES:
        reason = ""
        if kind in ("dynamic", "longrope"):
            reason = (
                "; its angles depend on the length of the whole text, so keys in the cache would have to turn again,"
                " which mixed slots cannot: use linear, yarn or llama3 scaling"
            )
        raise UnsupportedModelError(f"rope type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}{reason}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor: expected 1 (whole heads turn), got {rope['partial_rotary_factor']!r}"
        )
    theta = _number(rope, "theta")
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "linear":
        return frequencies / _number(rope, "factor"), 1.0
    if kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if kind == "yarn":
        return _yarn(frequencies, rope, theta, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3(frequencies: FloatArray, rope: dict[str, Any]) -> FloatArray:
    factor = _number(rope, "factor")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"rope: llama3: high_freq_factor: expected more than low_freq_factor={low}, got {high}")
    # turns of a channel pair over the original context: few = low frequency
    turns = _number(rope, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)


def _yarn(frequencies: FloatArray, rope: dict[str, Any], theta: float, head_dim: int) -> FloatArray:
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings")

    def pair_with_turns(turns: float) -> float:  # the (fractional) pair that turns so often over the original context
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_turns(_number(rope, "beta_fast", 32.0))
    high = pair_with_turns(_number(rope, "beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step, as in transformers
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1 - interpolated + interpolated / factor)


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    factor = _number(rope, "factor")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(_number(rope, "mscale")) / magnitude(_number(rope, "mscale_all_dim"))
    return magnitude(1.0)


def rope_tables(rope: dict[str, Any], head_dim: int) -> list[tuple[Table, Table]]:
    """(cos, sin) of each digit of the position, lowest first: three pairs, (2048 | 2048 | 512, head_dim / 2) float32.

    Digit k of a position is `(position // 2048**k) % 2048`, for positions 0 to 2^31 - 1. Composing the three rotations
    gives the angle; the attention scaling of YaRN is already in the tables of the lowest digit.

    Raises:
        UnsupportedModelError, ConfigError: see `inverse_frequencies`.
    """
    frequencies, scaling = inverse_frequencies(rope, head_dim)
    tables = []
    for k, entries in enumerate(DIGIT_ENTRIES):
        # at most 2^31 rad, so the float64 product is off by less than 2^-21 rad
        angles = np.arange(entries, dtype=np.float64)[:, None] * float(DIGIT**k) * frequencies
        scale = scaling if k == 0 else 1.0
        tables.append(((np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)))
    return tables


def combine_tables(tables: list[tuple[Table, Table]], positions: npt.NDArray[np.int64]) -> tuple[Table, Table]:
    """cos and sin at `positions` (any shape), positions.shape + (head_dim / 2,) float32, all arithmetic in float32.

    This is what the graphs do; here it is for tests and for readers.
    """
    (cos, sin), *rest = ((c[digit], s[digit]) for (c, s), digit in zip(tables, _digits(positions), strict=True))
    for c, s in rest:
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return cos, sin


def _digits(positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [(positions // DIGIT**k) % DIGIT for k in range(len(DIGIT_ENTRIES))]
