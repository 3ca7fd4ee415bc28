"""Disks as tests need them: one that fails for some files, and one that says which files were opened."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_CALLS = (
    (io, "open"), (os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (os, "mkdir"), (os, "unlink"),
    (os, "replace"), (os, "rename"),
)  # fmt: skip


@contextmanager
def failing(
    number: int, *, of: Path | None = None, of_name: str | None = None, only_writing: bool = False
) -> Iterator[None]:
    """A fake of a disk that fails with this errno for a file or folder and all below it, or for files of a name;
    `only_writing`: only where they are written whole (`durable.atomic_write`), not where they are read.

    It stands for what cannot be had on demand: a stale handle, a bad sector, a mode that root does not heed. It fails
    the calls that the standard library makes, and only in this process.
    """

    def concerns(path: object) -> bool:
        if not isinstance(path, str | Path):
            return False  # a descriptor
        name = Path(path).name
        # A file that is being written has a temporary name before its own: `.spec.json.x1y2z3.tmp`.
        is_written = of_name is not None and name.startswith(f".{of_name}.")
        is_meant = name == of_name or (of is not None and (Path(path) == of or of in Path(path).parents))
        return is_written or (is_meant and not only_writing)

    def fails(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *arguments: Any, **options: Any) -> Any:
            if concerns(path):
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *arguments, **options)

        return called

    with ExitStack() as patched:
        for module, name in _CALLS:
            patched.enter_context(mock.patch.object(module, name, fails(getattr(module, name))))
        yield


_listening: list[list[Path]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "open" and isinstance(arguments[0], str | bytes | Path):
        for opened in _listening:
            opened.append(Path(os.fsdecode(arguments[0])))


sys.addaudithook(_hear)  # for good: Python has no way to take one back, so it hears nothing most of the time


@contextmanager
def opened_files(below: Path) -> Iterator[list[Path]]:
    """Every file below a folder that this process opens in the block, as often as it does."""
    opened: list[Path] = []
    _listening.append(opened)
    try:
        yield opened
    finally:
        _listening.remove(opened)
        opened[:] = [path for path in opened if path.is_relative_to(below)]
