"""Where results lie and how they are found: the one place that knows the names of their folders and files.

`<store>/<recipe>/<asset>/<variant>/<partition_key>/<fingerprint[:16]>/`. The names are normative (FORMAT.md); the rest
of the project asks this module and never joins such a path itself.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from kd_assets.durable import listing, mode_if_there
from kd_assets.errors import InputError, MissingInputError, StoreError

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "journal.jsonl"
INDEX_NAME = "documents.index"
LEASE_NAME = ".lease"
HEAD_NAME = "head.json"
AUDIT_NAME = "audit.jsonl"
QUARANTINE_NAME = "quarantine"
"""In a recipe's folder: results that were put aside."""

VARIANT_LENGTH = 12
FOLDER_FINGERPRINT_LENGTH = 16
_MAX_NAME_BYTES = 255  # NAME_MAX of every file system we care about

_ASSET = re.compile(r"[a-z][a-z0-9_]*")
_HEX = re.compile(r"[0-9a-f]+")


def result_folder(recipe_folder: Path, asset: str, variant: str, partition_key: str, fingerprint: str) -> Path:
    """The folder of one result. Nothing is created.

    `variant` has 12 hexadecimal digits, `fingerprint` 64 (its first 16 name the folder). Raises InputError for a
    partition key that is no safe folder name, and for anything else that would leave its place in the tree.
    """
    if not _ASSET.fullmatch(asset):
        raise InputError(f"asset {asset!r} cannot name a folder: use lower-case letters, digits and underscores")
    if not _is_hex(variant, VARIANT_LENGTH):
        raise InputError(f"variant {variant!r} is not {VARIANT_LENGTH} hexadecimal digits")
    if not _is_hex(fingerprint, 64):
        raise InputError(f"fingerprint {fingerprint!r} is not 64 hexadecimal digits")
    check_partition_key(partition_key)
    return recipe_folder / asset / variant / partition_key / fingerprint[:FOLDER_FINGERPRINT_LENGTH]


def check_partition_key(partition_key: str) -> None:
    """Raise InputError unless the key can be a folder's name on every file system, and stays inside its parent."""
    reason = None
    if not partition_key:
        reason = "it is empty"
    elif "/" in partition_key or "\\" in partition_key:
        reason = "it holds a slash"
    elif ".." in partition_key or partition_key.startswith("."):
        reason = "it starts with a dot or holds two in a row"
    elif not partition_key.isprintable():
        reason = "it holds a control character, such as NUL or a newline"
    elif len(partition_key.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        reason = f"it is longer than {_MAX_NAME_BYTES} bytes"
    elif partition_key == HEAD_NAME:
        reason = "the store uses this name"
    if reason is not None:
        raise InputError(f"partition key {partition_key[:80]!r} cannot name a folder: {reason}")


def part_name(index: int, suffix: str) -> str:
    return f"part-{index:05d}{suffix}"


def is_file_name(name: str) -> bool:
    """Whether a part of a result may have this name: it stays below its folder (a slash leads into a folder there), and
    is none of the store's own files."""
    own = (MANIFEST_NAME, JOURNAL_NAME, INDEX_NAME, LEASE_NAME)
    return name.isprintable() and name not in own and all(n and not n.startswith(".") for n in name.split("/"))


def count_durable_files(folders: Iterable[Path]) -> int:
    """How many part files and manifests these result folders hold, folders in them included and links to folders left
    alone; a folder that is not there holds none.

    Grows with every step of work that a kill does not undo. Nothing is opened: 3,000 folders take about 30 ms. Raises
    StorageUnavailableError.
    """
    n_files, waiting = 0, list(folders)
    while waiting:
        folder = waiting.pop()
        for name, is_folder in listing(folder).items():
            if name.startswith(".") or name in (JOURNAL_NAME, INDEX_NAME):
                continue
            if is_folder and not (folder / name).is_symlink():
                waiting.append(folder / name)
            else:
                n_files += 1
    return n_files


def require_folder(path: Path) -> None:
    """Raise MissingInputError where there is no such folder, StorageUnavailableError where that cannot be told."""
    mode = mode_if_there(path)
    if mode is None:
        raise MissingInputError(f"{path} does not exist")
    if not stat.S_ISDIR(mode):
        raise MissingInputError(f"{path} is not a folder")


def folders_below(
    path: Path, unreadable: Callable[[Path, StoreError], None]
) -> Iterator[tuple[Path, Mapping[str, bool]]]:
    """`path` and every folder below it down to the results', each with its listing, in their order.

    Links are followed, as readers follow them, but not back up. Results that were put aside are left out, unless `path`
    is among them. `unreadable` is told of folders that cannot be listed.
    """
    waiting: list[tuple[Path, frozenset[str]]] = [(path, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(folder)
        if real in above:
            continue
        try:
            names = listing(folder)
        except StoreError as e:
            unreadable(folder, e)
            continue
        yield folder, names
        if not is_result_folder(folder, names):
            is_recipe = AUDIT_NAME in names
            folders = [
                folder / name
                for name, is_folder in names.items()
                if is_folder and not (is_recipe and name == QUARANTINE_NAME)
            ]
            waiting += [(below, above | {real}) for below in reversed(folders)]


def result_folders(path: Path) -> Iterator[Path]:
    """Every folder at or below `path` that is a result's, in their order. Raises StorageUnavailableError."""

    def unreadable(path: Path, e: StoreError) -> None:
        raise e

    return (folder for folder, names in folders_below(path, unreadable) if is_result_folder(folder, names))


def is_result_folder(path: Path, names: Mapping[str, bool]) -> bool:
    """By its place and name, or by its manifest. `names`: its listing."""
    return MANIFEST_NAME in names or (
        is_result_folder_name(path.name) and is_variant_name(path.absolute().parent.parent.name)
    )


def is_partition_folder(path: Path) -> bool:
    """By its place: it is in the folder of a variant."""
    return is_variant_name(path.absolute().parent.name)


def is_result_folder_name(name: str) -> bool:
    return _is_hex(name, FOLDER_FINGERPRINT_LENGTH)


def is_variant_name(name: str) -> bool:
    return _is_hex(name, VARIANT_LENGTH)


def recipe_folder_of(folder: Path) -> Path:
    """The recipe's folder of a result folder."""
    return folder.parents[3]


def _is_hex(text: str, n_digits: int) -> bool:
    return len(text) == n_digits and _HEX.fullmatch(text) is not None
