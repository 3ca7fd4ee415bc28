"""`kd-assets index`: writes the indexes of documents anew that are lost, whatever the size of their results."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_assets.commands.base import Subcommand, recipe_folder_of, selected_partitions, show, show_json
from kd_assets.commands.progress import Progress
from kd_assets.contract import CACHES, Asset
from kd_assets.durable import size_if_there
from kd_assets.errors import EXIT_FAILED, NotCommittedError, StorageUnavailableError, StoreError
from kd_assets.locks import Lease
from kd_assets.store.layout import INDEX_NAME, LEASE_NAME
from kd_assets.store.manifest import Manifest, PartRecord, read_manifest
from kd_assets.store.reading.chosen import require_place, variants_of
from kd_assets.store.writing.lost_index import is_index_lost, write_index_anew
from kd_assets.store.writing.writer import lease_holder

ASSETS: tuple[Asset, ...] = ("shards_manifest", *CACHES)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name, or its folder in a store")
    parser.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """0 when every current result that should have an index has a sound one; lines of progress on stderr."""
    recipe_folder = recipe_folder_of(arguments.recipe)
    keys = selected_partitions(recipe_folder, arguments.partitions, ASSETS)
    folders = list(_current_results(recipe_folder, keys))
    if not folders:
        raise NotCommittedError(f"{recipe_folder} has no committed results of these partitions: materialize them")
    written: list[Path] = []
    refused: dict[Path, str] = {}
    progress = Progress()
    for number, folder in enumerate(folders):
        at = f"{number + 1} of {len(folders)}, {folder}"
        try:
            if _written_anew(folder, functools.partial(_hashing, progress, at)):
                written.append(folder)
        except StorageUnavailableError:
            raise
        except StoreError as e:
            refused[folder] = str(e)
    if arguments.json:
        names = {"written": [str(folder) for folder in written], "refused": {str(f): why for f, why in refused.items()}}
        show_json({"recipe_folder": str(recipe_folder), "n_results": len(folders), **names})
    else:
        show(*(f"{folder / INDEX_NAME} is written anew" for folder in written))
        show(*(f"{folder / INDEX_NAME} is not written: {why}" for folder, why in refused.items()), stream=sys.stderr)
        n_sound = len(folders) - len(written) - len(refused)
        show(
            f"{recipe_folder}: {len(folders)} results: {n_sound} need no index or have a sound one, {len(written)} are "
            f"written anew, {len(refused)} are not"
        )
    return EXIT_FAILED if refused else 0


def _current_results(recipe_folder: Path, keys: list[str] | None) -> Iterator[Path]:
    for asset in ASSETS:
        for by_key in variants_of(recipe_folder / asset).values():
            yield from (folder for key, folder in by_key.items() if keys is None or key in keys)


def _written_anew(folder: Path, on_part: Callable[[PartRecord], None]) -> bool:
    """Whether the index of a result was lost, and is there again. Raises StoreError where it cannot be written."""
    manifest: Manifest = read_manifest(folder)
    require_place(folder, manifest)
    if not is_index_lost(folder, manifest):
        return False
    with _leased(folder):
        write_index_anew(folder, manifest, on_part=on_part)
    return True


@contextlib.contextmanager
def _leased(folder: Path) -> Iterator[None]:
    """With the lease of a result that a writer has worked on; a copy without the file of it stays one."""
    if size_if_there(folder / LEASE_NAME) is None:
        yield
        return
    lease = Lease(folder / LEASE_NAME)
    lease.acquire(lease_holder())
    try:
        yield
    finally:
        lease.release()


def _hashing(progress: Progress, at: str, part: PartRecord) -> None:
    progress.tell(lambda _: f"index: result {at}: hashing {part.name} ({part.n_bytes:,} bytes)")


INDEX = Subcommand(
    name="index",
    description="write lost indexes of documents anew, from parts whose hashes are right; results need none to be read",
    add_arguments=_arguments,
    run=_run,
)
