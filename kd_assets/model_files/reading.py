"""Reading a model's files without waiting for ever, and its JSON without being led astray by it.

Anyone may import it; standard library only. The invariant: what is opened is a regular file. Opening a named pipe waits
for its writer, and a device has no end.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from kd_assets.errors import InputError, MissingInputError

MOST_JSON_BYTES = 1 << 28
"""The index of the largest mixture of experts has 20 MB."""
MOST_LEVELS = 100
"""Of lists and objects within each other. Configurations have about ten; Python itself ends at about a thousand."""

READ_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".tiktoken", ".txt", ".jinja", ".py", ".bin"})
"""Of files that transformers may open by itself."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """A regular file, for reading. Raises MissingInputError, at once, for anything else that has this name."""
    fd = -1
    try:
        _refuse_other_kinds(path, os.stat(path).st_mode)  # before it is opened: opening a device may do something
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        _refuse_other_kinds(path, os.fstat(fd).st_mode)
        return os.fdopen(fd, "rb")
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def refuse_other_kinds(folder: Path) -> None:
    """Raise MissingInputError, naming it, for a pipe, socket or device in the place of a file that may be read."""
    try:
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
            if path.suffix in READ_SUFFIXES and path.exists() and not path.is_dir():
                _refuse_other_kinds(path, path.stat().st_mode)
    except OSError as e:
        raise MissingInputError(f"the model folder {folder} cannot be read: {os_reason(e)}") from e


def read_json(path: Path, why: str) -> Any:
    """What a JSON file holds. `why`: what it is there for.

    Raises MissingInputError for a file that cannot be read, InputError for one that is not JSON or too large or deep.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MOST_JSON_BYTES + 1)
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {os_reason(e)}; {why}") from e
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


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise MissingInputError(
            f"{path} cannot be read: it is {kind} and no file; put the model's own file in its place"
        )
