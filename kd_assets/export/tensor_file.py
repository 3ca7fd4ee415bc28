"""The safetensors container, written from views: the library's own writer takes all tensors of a file in memory.

A file is eight bytes with the header's length, the header as JSON, and the tensors one after the other (the safetensors
format, which Hugging Face publishes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES = {"uint32": "U32", "bool": "BOOL", "float16": "F16", "float32": "F32", "int64": "I64", "bfloat16": "BF16"}
"""By numpy's name, and bfloat16."""

DescribedTensor = tuple[str, str, list[int], int]
"""Name, dtype in the container's words, shape, and bytes of a tensor."""


def tensor_header(tensors: Iterable[DescribedTensor]) -> bytes:
    """The file's first bytes: the header's length and the header, for tensors that follow in this order."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, dtype, shape, n_bytes in tensors:
        start, stop = stop, stop + n_bytes
        said[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A tensor's bytes in a file: a view where the array is in one piece."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
