"""What the end of a rank before its time means: an error of ours, and whether it is the cause of the other ends.

Used by `rank_group` and `follower`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from kd_assets import errors
from kd_assets.errors import KdAssetsError, OutOfDeviceMemoryError, RankLostError


@dataclass(frozen=True, kw_only=True, slots=True)
class LostRank:
    """The end of a rank before its time."""

    error: KdAssetsError
    is_cause: bool
    """Not merely that its connection to another one broke."""


def lost_rank(
    rank: int, n_ranks: int, status: int, final_error: tuple[str, str] | None, last_lines: Sequence[str]
) -> LostRank:
    """What a rank's end means. `final_error`: class and text of what it said it ends with."""
    who, is_cause = f"rank {rank} of {n_ranks}", True
    if final_error is not None:
        name, message = final_error
        is_cause = not is_only_a_lost_connection(message)
        foreseen = getattr(errors, name, None)
        if isinstance(foreseen, type) and issubclass(foreseen, KdAssetsError):
            return LostRank(error=foreseen(f"{who}: {message}"), is_cause=is_cause)
        how = f"failed with {name}: {message}"
    elif status < 0:
        how = f"was killed by {signal_name(-status)}"
    else:
        how = f"ended with status {status}"
    lines = "".join(f"\n  {line}" for line in last_lines)
    text = f"{who} of the teacher {how}; the others cannot go on without it"
    return LostRank(error=RankLostError(text + (f". Its last lines:{lines}" if lines else "")), is_cause=is_cause)


def is_only_a_lost_connection(message: str) -> bool:
    """Whether an error says no more than that another rank is gone, in the words of gloo or NCCL."""
    return re.search(r"gloo|nccl|connection (closed|reset)", message, re.IGNORECASE) is not None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def as_our_error(e: BaseException) -> KdAssetsError | None:
    """The error as ours, where it is none that the loss of another rank could cause."""
    import torch

    if isinstance(e, torch.OutOfMemoryError):
        return OutOfDeviceMemoryError(f"the GPU's memory did not suffice ({str(e).splitlines()[0][:400]})")
    return e if isinstance(e, KdAssetsError) else None
