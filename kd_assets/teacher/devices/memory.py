"""Running out of memory as an error that says of which kind and what helps, and that leaves a usable process behind.

Used by `kd_assets.teacher` only. The invariant: an error that comes out of here holds no array. Exceptions keep
the frames they went through, and with them every tensor on the way: the error of the library is let go before ours is
raised, and torch's cache is emptied, so that the next partition finds the memory that this one did not get.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from kd_assets.errors import KdAssetsError, OutOfDeviceMemoryError, OutOfHostMemoryError

X = TypeVar("X")
Y = TypeVar("Y")

DEVICE_TEXTS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What libraries beside torch's allocator say."""
HOST_TEXTS = ("can't allocate memory", "Cannot allocate memory")
"""torch's CPU allocator (c10/core/impl/alloc_cpu.cpp), and strerror(ENOMEM)."""


def within_memory(work: Callable[[X], Y], argument: X, *, doing: str, device_remedy: str) -> Y:
    """`work(argument)`. Raises OutOfDeviceMemoryError or OutOfHostMemoryError in place of the libraries' own errors.

    `doing` and `device_remedy` become part of the message.
    """
    try:
        return work(argument)
    except Exception as e:
        error = _memory_error(e, doing, device_remedy)
        if error is None:
            raise
    # Outside of the handler, so that `error` has no __context__: that would be `e` with all its frames.
    free_cached_memory()
    raise error


def free_cached_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_error(e: Exception, doing: str, device_remedy: str) -> KdAssetsError | None:
    text = str(e)
    reason = (text.splitlines() or [type(e).__name__])[0][:400]
    if isinstance(e, torch.OutOfMemoryError) or (
        isinstance(e, RuntimeError) and any(known in text for known in DEVICE_TEXTS)
    ):
        return OutOfDeviceMemoryError(f"{doing}: the GPU's memory did not suffice ({reason}); {device_remedy}")
    if isinstance(e, MemoryError) or (
        isinstance(e, (RuntimeError, OSError)) and any(known in text for known in HOST_TEXTS)
    ):
        return OutOfHostMemoryError(
            f"{doing}: the node's memory did not suffice ({reason}); ask for more memory for the task"
        )
    return None
