"""`kd-assets export`: a recipe's caches as files that a trainer reads."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_assets.commands.base import Subcommand, recipe_folder_of, selected_partitions, show, show_json
from kd_assets.commands.progress import Progress
from kd_assets.contract import CACHES, Asset
from kd_assets.errors import RecipeError
from kd_assets.export.exporting import ExportProgress, export_recipe
from kd_assets.export.folder import Exported
from kd_assets.export.format import ExportOptions
from kd_assets.export.formats import FORMATS
from kd_assets.store.schema import FINAL_CONVENTIONS, HiddenState


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=list(FORMATS), help="whose files are written")
    parser.add_argument("recipe", help="its name in the dg project around here, or its folder in a store")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with")
    parser.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    parser.add_argument("--assets", nargs="+", choices=CACHES, metavar="CACHE", help="only these caches")
    parser.add_argument("--states", nargs="+", metavar="N", help="only these blocks, before_norm, after_norm")
    parser.add_argument("--variant", nargs="+", default=[], metavar="CACHE=VARIANT", help="where a cache has several")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="cut documents to their first tokens")
    parser.add_argument("--validation-share", type=float, default=0.0, metavar="SHARE", help="of documents, by id")
    parser.add_argument("--learned-only", action="store_true", help="leave out positions that the loss mask leaves out")
    parser.add_argument("--draft-vocabulary", type=int, metavar="TOKENS", help="of a draft head, by frequency")
    parser.add_argument("--pack-to", type=int, metavar="TOKENS", help="rows of whole documents, padded to this length")
    parser.add_argument("--seed", type=int, default=0, help="of the validation set (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """Export, with lines of progress on stderr; 0 when the export is whole."""
    recipe_folder = recipe_folder_of(arguments.recipe)
    progress = Progress()

    def tell(done: ExportProgress) -> None:
        progress.tell(functools.partial(progress_line, done), is_last=done.n_sections == done.of_sections)

    exported = export_recipe(
        arguments.format,
        recipe_folder,
        arguments.to,
        options=_options(arguments),
        partition_keys=selected_partitions(recipe_folder, arguments.partitions, CACHES),
        variants=dict(map(_variant, arguments.variant)),
        on_progress=tell,
    )
    if arguments.json:
        show_json(summary(exported))
    else:
        show(*text_lines(exported))
    return 0


def summary(exported: Exported) -> dict[str, Any]:
    """What the command says as JSON: `export.json` without the list of files, and where it lies."""
    said = {name: value for name, value in exported.said.items() if name != "files"}
    return {"folder": str(exported.folder), "n_files": len(exported.files), "n_bytes": exported.n_bytes} | said


def text_lines(exported: Exported) -> list[str]:
    said = exported.said
    splits = "".join(f", {name} {n:,}" for name, n in said["splits"].items())
    lines = [
        f"{exported.folder}: {exported.export_format} of recipe {exported.recipe}: {exported.n_documents:,} documents"
        f"{splits}, {exported.n_tokens:,} tokens, {len(exported.files)} files, {exported.n_bytes:,} bytes"
    ]
    if said["n_cut_to_the_shortest_cache"]:
        lines.append(f"{said['n_cut_to_the_shortest_cache']:,} documents are cut to the tokens that all caches have")
    for why, left_out in said["left_out"].items():
        named = ", ".join(left_out["first"])
        lines.append(f"{left_out['n_documents']:,} documents are left out: {why}, such as {named}")
    return lines


def progress_line(progress: ExportProgress, elapsed_s: float) -> str:
    rate = progress.n_bytes / 2**20 / max(elapsed_s, 1e-3)
    return (
        f"export: {progress.n_documents:,} of {progress.of_documents:,} documents, section {progress.n_sections:,} "
        f"of {progress.of_sections:,} ({progress.partition_key}), {progress.n_bytes:,} bytes, {rate:,.0f} MiB/s"
    )


def _options(arguments: argparse.Namespace) -> ExportOptions:
    assets: Sequence[Asset] | None = arguments.assets
    return ExportOptions(
        max_length=arguments.max_length,
        validation_share=arguments.validation_share,
        learned_only=arguments.learned_only,
        draft_vocabulary=arguments.draft_vocabulary,
        pack_to=arguments.pack_to,
        seed=arguments.seed,
        assets=None if assets is None else tuple(asset for asset in CACHES if asset in assets),
        states=None if arguments.states is None else tuple(map(_state, arguments.states)),
    )


def _state(text: str) -> HiddenState:
    if text.isdecimal():
        return int(text)
    for final in FINAL_CONVENTIONS:
        if text == final:
            return final
    raise RecipeError(f"{text!r} is no state: give the number of a decoder block, {' or '.join(FINAL_CONVENTIONS)}")


def _variant(text: str) -> tuple[Asset, str]:
    asset, _, variant = text.partition("=")
    for known in CACHES:
        if asset == known and variant:
            return known, variant
    raise RecipeError(f"--variant {text!r} is not of the form CACHE=VARIANT with a cache of {', '.join(CACHES)}")


EXPORT = Subcommand(
    name="export",
    description="write a recipe's caches as files that a trainer reads; goes on where a killed export left off",
    add_arguments=_arguments,
    run=_run,
)
