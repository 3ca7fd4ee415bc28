"""`kd-assets quarantine`: puts results aside that are not to be trusted, so that they are made again."""

from __future__ import annotations

import argparse

from kd_assets.commands.base import Subcommand, recipe_folder_of, show, show_json
from kd_assets.contract import CACHES
from kd_assets.durable import listing
from kd_assets.errors import MissingInputError
from kd_assets.store import put_aside


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe's name, or its folder in a store")
    parser.add_argument("partitions", nargs="+", metavar="PARTITION")
    parser.add_argument("--why", required=True, help="for the audit log, and for whoever finds it")
    parser.add_argument("--assets", nargs="+", metavar="NAME", help="such as topk_cache (default: all caches)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--variant", help="where an asset has several")
    which.add_argument("--all-variants", action="store_true", help="the results of all of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    folder = recipe_folder_of(arguments.recipe)
    there = [name for name, is_folder in listing(folder).items() if is_folder]
    if unknown := [name for name in arguments.assets or () if name not in there]:
        raise MissingInputError(f"{folder} has nothing of an asset {unknown[0]!r}; it has {', '.join(sorted(there))}")
    assets = arguments.assets or [asset for asset in CACHES if asset in there]
    moved = put_aside(
        folder,
        list(dict.fromkeys(arguments.partitions)),
        assets,
        why=arguments.why,
        variant=arguments.variant,
        all_variants=arguments.all_variants,
    )
    if arguments.json:
        show_json({"moved": [{name: str(getattr(result, name)) for name in result.__slots__} for result in moved]})
        return 0
    for result in moved:
        show(f"{folder.name}/{result.asset} {result.partition_key}: moved to {result.folder}")
    keys, made = {r.partition_key for r in moved}, {r.asset for r in moved}
    show(
        f"{len(moved)} results are aside, and no reader has them. Materialize {', '.join(sorted(made))} of "
        f"{', '.join(sorted(keys))} to make them again ({folder.name}_nightly_caches and {folder.name}_new_data do, "
        "where they are on); nothing was deleted"
    )
    return 0


QUARANTINE = Subcommand(
    name="quarantine",
    description="move results aside so that the next materialization makes them again; deletes nothing",
    add_arguments=_arguments,
    run=_run,
)
