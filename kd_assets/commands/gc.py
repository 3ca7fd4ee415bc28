"""`kd-assets gc --dry-run`: what nothing reads any more, and how much space it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kd_assets.commands.base import Subcommand, recipe_folder_of, show, show_json
from kd_assets.errors import InputError
from kd_assets.store.superseded import Superseded, superseded

SHOWN = 5
"""Paths of each kind that are named without --all."""

IN_WORDS = {
    "replaced": "results that a newer one of their partition has replaced",
    "older variant": "results of a variant that is neither the recipe's nor the last one, where the recipe's is there",
    "not planned": "results of partitions that the plan does not name",
    "other shard": "results of a shard that is not the planned one",
    "failed check": "results that failed a check",
    "unfinished": "results without a manifest, which a task would go on with",
    "put aside": "results in quarantine",
    "old plan": "earlier shard plans",
}

ONLY_EXACT_COPY = "  (the only exact copy: what stays of these numbers is rounded, and is no source of another codec)"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name, or its folder in a store")
    parser.add_argument("--dry-run", action="store_true", help="required: nothing here deletes")
    parser.add_argument("--all", action="store_true", help="name every path")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every path")


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.dry_run:
        raise InputError(
            "kd-assets deletes nothing: say --dry-run to see what nothing reads any more, and delete what you will "
            "yourself"
        )
    folder = recipe_folder_of(arguments.recipe)
    found = superseded(folder)
    if arguments.json:
        paths = [{name: _plain(getattr(item, name)) for name in item.__slots__} for item in found]
        show_json({"recipe_folder": str(folder), "disk_bytes": sum(i.disk_bytes for i in found), "superseded": paths})
        return 0
    for why, words in IN_WORDS.items():
        if items := [item for item in found if item.why == why]:
            show(*_lines(words, items, SHOWN if not arguments.all else len(items)))
    total = sum(item.disk_bytes for item in found)
    show(f"{folder}: {len(found)} that nothing reads, {total:,} bytes on disk; nothing was deleted")
    return 0


def _lines(words: str, items: Sequence[Superseded], n_shown: int) -> list[str]:
    lines = [f"{len(items)} {words}: {sum(item.disk_bytes for item in items):,} bytes on disk"]
    # Each of these is named: who deletes one has nothing left to recode from.
    shown = [item for n, item in enumerate(items) if n < n_shown or item.is_only_exact_copy]
    lines += [
        f"  {item.disk_bytes:>16,}  {item.path}{ONLY_EXACT_COPY if item.is_only_exact_copy else ''}" for item in shown
    ]
    if len(items) > len(shown):
        lines.append(f"  and {len(items) - len(shown)} more (--all)")
    return lines


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, int) else str(value)


GC = Subcommand(
    name="gc",
    description="what nothing reads any more, with sizes; only with --dry-run, as nothing here deletes",
    add_arguments=_arguments,
    run=_run,
)
