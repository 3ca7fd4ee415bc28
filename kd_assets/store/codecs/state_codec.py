"""The codecs of hidden states by name: what a state takes, and how far it may be off.

Who plans, writes, bills and checks a cache asks here. The contract and the standard library only.
"""

from __future__ import annotations

import math
from typing import get_args

from kd_assets.contract import StateCodec
from kd_assets.errors import RecipeError

RAW: StateCodec = "raw"
CODED: tuple[StateCodec, ...] = tuple(name for name in get_args(StateCodec) if name != RAW)

BFLOAT16_RTOL = 2.0**-8
"""What decoding to bfloat16 may change in a number: half a unit in the last of its 8 bits, and a tie's rest."""


def group_of(codec: str) -> int | None:
    """Values that share a scale; None where a state has one, or none."""
    stem, _, group = codec.partition("_")
    return int(group) if stem == "int8" and group.isdigit() else None


def require_groups(codec: str, hidden_size: int) -> None:
    """Raise RecipeError where states of this size cannot be cut into the codec's groups."""
    group = group_of(codec)
    if group is not None and hidden_size % group:
        raise RecipeError(
            f"hidden_states.codec is {codec}, whose groups of {group} do not divide the teacher's hidden size "
            f"{hidden_size}: take int8_32 where 32 divides it, or fp8, split or raw"
        )


def bytes_a_state(codec: str, hidden_size: int) -> float:
    """At most, before what a container adds. `split` saves about a third of it, which no number promises."""
    if codec == "fp8":
        return hidden_size + 4
    if (group := group_of(codec)) is not None:
        return hidden_size + 2 * hidden_size / group
    return hidden_size * 2


def largest_error(codec: str) -> float:
    """What coding may change in a state at most: the norm of the difference over the norm. More is no rounding.

    fp8 has 4 significant bits, so half a unit is 2⁻⁴ of a number; numbers below 2⁻⁶ scales, of which the largest is
    448, are off by 2⁻¹⁰ of one, together by √H times that over 448. int8: half a scale for each value, over the 127 of
    the group's largest; the scale is rounded up, by 2⁻⁷ at most.
    """
    if codec == "fp8":
        return 2.0**-4 + 2.0**-10 + BFLOAT16_RTOL
    if (group := group_of(codec)) is not None:
        return math.sqrt(group) * (1 + 2.0**-7) / 254 + BFLOAT16_RTOL
    return 0.0
