"""What the subcommands share: how they are declared, how they print, and how they reach the control plane."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kd_assets.contract import Asset
from kd_assets.errors import MissingInputError, printable
from kd_assets.store import planned_partitions, variants_of
from kd_assets.store.layout import AUDIT_NAME
from kd_assets.store.reading.selection import select_partitions


@dataclass(frozen=True, kw_only=True, slots=True)
class Subcommand:
    """A subcommand: its name, its help, what it adds to the parser, and what it does (returns the exit status)."""

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def control_plane(module: str) -> Any:
    """A module of the planes that need dagster. Raises MissingInputError where its packages are not installed."""
    return _loaded(module, "run it on the service node, or pip install 'kd-assets[control]'")


def compute_plane(module: str) -> Any:
    """A module that needs torch. Raises MissingInputError where its packages are not installed."""
    return _loaded(module, "run it on a node, or pip install 'kd-assets[compute]'")


def serving_plane(module: str) -> Any:
    """A module that needs a web server. Raises MissingInputError where its packages are not installed."""
    return _loaded(module, "pip install 'kd-assets[serve]'")


def _loaded(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "kd_assets":
            raise
        raise MissingInputError(f"this command needs {e.name}, which is not installed here: {remedy}") from e


def recipe_folder_of(recipe: str) -> Path:
    """A recipe's folder in a store: the path that was given, or that of the recipe of this name. Raises RecipeError or
    MissingInputError where there is none."""
    return recipe_and_folder_of(recipe)[1]


def recipe_and_folder_of(recipe: str) -> tuple[Any | None, Path]:
    """The recipe, too: a `recipes.recipe.Recipe`, None where a path was given. Raises as `recipe_folder_of` does."""
    if "/" in recipe or Path(recipe).is_dir():
        folder = Path(recipe).absolute()
        if not (folder / AUDIT_NAME).is_file():
            raise MissingInputError(f"{folder} is no recipe's folder in a store: it has no {AUDIT_NAME}")
        return None, folder
    try:
        named = control_plane("kd_assets.components").load_recipe(recipe)
    except MissingInputError as e:
        raise MissingInputError(f"{e}; or give the path of the recipe's folder in the store") from e
    platform = control_plane("kd_assets.orchestration.platform").Platform.from_environment()
    of_recipe: Path = platform.recipe_folder(named.name)
    if not (of_recipe / AUDIT_NAME).is_file():
        raise MissingInputError(f"nothing of recipe {named.name} was made yet in {of_recipe}: is KD_HOME right?")
    return named, of_recipe


def selected_partitions(recipe_folder: Path, selection: str | None, assets: Sequence[Asset]) -> list[str] | None:
    """Keys of `a..b` (both included), `a,b,c`, or one; None: all. Where no plan says which there are, those of these
    assets' results. Raises RecipeError for what is not there."""
    if selection is None:
        return None
    plan = planned_partitions(recipe_folder)
    if plan is not None:
        known = list(plan.input_hashes)
    else:
        variants = [variants_of(recipe_folder / asset) for asset in assets]
        known = sorted({key for of_asset in variants for folders in of_asset.values() for key in folders})
    return select_partitions(known, selection)


def show(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines, with escapes in the place of all that is no printable character."""
    print("\n".join(printable(line) for line in lines), file=stream or sys.stdout, flush=True)


def show_json(record: Any) -> None:
    """Print one JSON object, in ASCII for the same reason."""
    print(json.dumps(record, indent=1, default=str))


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number
