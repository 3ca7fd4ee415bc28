"""What a safetensors file says of its tensors, from its header alone: nothing of the weights is read.

Anyone may import it: the package `safetensors` brings no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kd_assets.durable import open_file
from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files.reading import os_reason


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    name: str
    dtype: str
    """As the format names it: `BF16`."""
    shape: tuple[int, ...]

    @property
    def n_numbers(self) -> int:
        return math.prod(self.shape)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a whole file.

    Raises MissingInputError for a file that cannot be opened, InputError for one that is none of this format or not as
    long as its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return [
                StoredTensor(name=name, dtype=str(found.get_dtype()), shape=tuple(found.get_shape()))
                for name, found in slices.items()
            ]
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {os_reason(e)}") from e
    except SafetensorError as e:
        raise InputError(f"{path} is no whole safetensors file ({e}): download it again") from e
