"""Reading a model's files without waiting for ever, and its JSON without being led astray by it.

Anyone may import it; standard library only. The invariant: what is opened is a regular file. Opening a named pipe waits
for its writer, and a device has no end.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from kd_assets.durable import is_passing, open_file, require_file, storage_error
from kd_assets.errors import InputError, MissingInputError

P = ParamSpec("P")
R = TypeVar("R")

MOST_JSON_BYTES = 1 << 28
"""The index of the largest mixture of experts has 20 MB."""
MOST_LEVELS = 100
"""Of lists and objects within each other. Configurations have about ten; Python itself ends at about a thousand."""

READ_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".tiktoken", ".txt", ".jinja", ".py", ".bin"})
"""Of files that transformers may open by itself."""


def refuse_other_kinds(folder: Path) -> None:
    """Raise MissingInputError, naming it, for a pipe, socket or device in the place of a file that may be read."""
    with reading_errors(folder, "it is the model's folder"):
        found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    for path in found:
        if path.suffix in READ_SUFFIXES:
            with reading_errors(path, "put the model's own file in its place"):
                if path.exists() and not path.is_dir():
                    require_file(path)


@contextlib.contextmanager
def reading_errors(path: Path, why: str = "") -> Iterator[None]:
    """Turn an OSError of the block into an answer that names the file: StorageUnreachableError for what passes, such as
    a stale handle, and MissingInputError for the rest. `why` is what the file is there for, or what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # RuntimeError: pathlib's word for a loop of symbolic links
        if isinstance(e, OSError) and e.errno != errno.ENOENT and is_passing(e):
            raise storage_error(e, path, "read") from e
        raise MissingInputError(f"{path} cannot be read: {os_reason(e)}" + (f"; {why}" if why else "")) from e


def reads_folder(read: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """For functions of a model's folder: no OSError leaves them bare (see `reading_errors`)."""

    @functools.wraps(read)
    def answered(folder: Path, /, *arguments: P.args, **options: P.kwargs) -> R:
        with reading_errors(folder):
            return read(folder, *arguments, **options)

    return answered


def read_json(path: Path, why: str) -> Any:
    """What a JSON file holds. `why`: what it is there for.

    Raises MissingInputError for a file that cannot be read, InputError for one that is not JSON or too large or deep.
    """
    with reading_errors(path, why), open_file(path) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise InputError(f"{path} is larger than {MOST_JSON_BYTES >> 20} MiB; {why}: download it again")
    try:
        value = json.loads(content)
    except RecursionError as e:
        raise _too_deep(path) from e
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}): download it again") from e
    if levels(value) > MOST_LEVELS:
        raise _too_deep(path)
    return value


def levels(value: Any) -> int:
    """How deep lists and objects lie within each other."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def os_reason(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def _too_deep(path: Path) -> InputError:
    return InputError(
        f"{path} has lists and objects more than {MOST_LEVELS} deep within each other, which no configuration of a "
        "model has: download it again"
    )
