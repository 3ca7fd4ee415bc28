"""A folder that is put back to what it was, however it was changed: only what differs is written anew."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

Seen = tuple[int, int, int]
"""Inode, time of the last change (which nothing can set back) and mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    data: bytes
    mode: int
    mtime_ns: int


class Mirror:
    """Remembers a folder of files and folders as it is now; small enough to be kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders: dict[str, int] = {}
        self._files: dict[str, _File] = {}
        for path in sorted(folder.rglob("*")):
            name, status = str(path.relative_to(folder)), path.lstat()
            if stat.S_ISDIR(status.st_mode):
                self._folders[name] = stat.S_IMODE(status.st_mode)
            else:
                assert stat.S_ISREG(status.st_mode), f"{path} is no plain file"
                mode = stat.S_IMODE(status.st_mode)
                self._files[name] = _File(data=path.read_bytes(), mode=mode, mtime_ns=status.st_mtime_ns)
        self._seen = {name: _seen(folder / name) for name in (*self._folders, *self._files)}

    def restore(self) -> None:
        """Undo whatever was done in the folder."""
        for root, folders, files in os.walk(os.fsencode(self._folder)):
            here = os.fsdecode(root)
            for found in (*folders, *files):
                full = os.path.join(here, os.fsdecode(found))
                name = os.path.relpath(full, self._folder)
                wanted = name in (self._folders if os.path.isdir(full) and not os.path.islink(full) else self._files)
                if not wanted or (name in self._files and _seen(Path(full)) != self._seen[name]):
                    _remove(full)
            folders[:] = [f for f in folders if os.path.lexists(os.path.join(root, f))]
        for name, mode in self._folders.items():
            path = self._folder / name
            if not path.exists():
                path.mkdir()
            path.chmod(mode)
        for name, file in self._files.items():
            path = self._folder / name
            if not path.exists():
                path.write_bytes(file.data)
                path.chmod(file.mode)
                os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
                self._seen[name] = _seen(path)


def _seen(path: Path) -> Seen:
    status = path.lstat()
    return (status.st_ino, status.st_ctime_ns, stat.S_IMODE(status.st_mode))


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
