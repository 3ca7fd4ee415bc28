"""`kd-assets card`: a recipe's card, for people and for machines."""

from __future__ import annotations

import argparse
import sys

from kd_assets.cards.contents import Contents, contents_of
from kd_assets.cards.page import card
from kd_assets.cards.write import write_card
from kd_assets.commands.base import Subcommand, control_plane, recipe_and_folder_of, show


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="its name, or its folder in a store")
    parser.add_argument("--write", action="store_true", help="write README.md and croissant.json beside the caches")


def _run(arguments: argparse.Namespace) -> int:
    contents, description = _contents(arguments.recipe)
    if arguments.write:
        written = write_card(contents, description=description)
        show(*map(str, written.files))
        if written.kept_in_words is not None:
            show(written.kept_in_words, stream=sys.stderr)
    else:
        show(*card(contents, description=description).splitlines())
    return 0


def _contents(recipe: str) -> tuple[Contents, str | None]:
    """What a card says, and the recipe's description. By a name it is the card that a run writes; by a folder alone
    nothing tells which parameters the recipe has now: it is that of the newest results."""
    named, folder = recipe_and_folder_of(recipe)
    if named is None:
        return contents_of(folder), None
    of_now = control_plane("kd_assets.orchestration.card_asset").is_of_recipe(named)
    return contents_of(folder, is_of_recipe=of_now, of_recipe=named.partitioned), named.description


CARD = Subcommand(
    name="card",
    description="what a recipe's caches hold, how far they are, what was measured, and how to use them",
    add_arguments=_arguments,
    run=_run,
)
