"""`kd-assets diff`: how far apart two caches of the same documents are."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_assets.cards.tokens import decoder_of
from kd_assets.cards.words import quoted
from kd_assets.commands.base import Subcommand, count, recipe_folder_of, show, show_json
from kd_assets.commands.progress import Progress
from kd_assets.contract import CACHES
from kd_assets.errors import EXIT_FAILED, MissingInputError
from kd_assets.store import CacheReader
from kd_assets.store.comparing import Comparison, Measure, compare, named
from kd_assets.store.layout import MANIFEST_NAME, is_variant_name
from kd_assets.store.manifest import without_non_finite

SHOWN_TOKENS = 24


def _arguments(parser: argparse.ArgumentParser) -> None:
    where = "a recipe's name or its folder in a store, a variant's folder in there, or a result's folder"
    parser.add_argument("first", help=where)
    parser.add_argument("second", help="the same of the other")
    parser.add_argument("--asset", choices=CACHES, help="of recipes: which cache")
    parser.add_argument("--worst", type=count, default=5, metavar="N", help="documents to show that differ most (5)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="folder that holds tokenizer.json")
    parser.add_argument("--allow-failed", action="store_true", help="also results whose checks failed")
    parser.add_argument(
        "--fail-above", type=float, metavar="X", help="exit 1 where the mean KL (or relative distance) is above this"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """Exit 1 only with --fail-above: where the mean is above it, or the two do not have the same documents."""
    readers = [reader_of(name, arguments) for name in (arguments.first, arguments.second)]
    found = compare(*readers, n_worst=arguments.worst, progress=_progress() if sys.stderr.isatty() else None)
    if arguments.json:
        show_json(without_non_finite(_json(found)))
    else:
        show(*_lines(found, readers[0], arguments.tokenizer))
    return EXIT_FAILED if arguments.fail_above is not None and _is_above(found, arguments.fail_above) else 0


def reader_of(name: str, arguments: argparse.Namespace) -> CacheReader:
    """A reader of what was named. Raises MissingInputError for what is none of those."""
    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        return CacheReader.from_folders([path], allow_failed=arguments.allow_failed)
    if is_variant_name(path.name) and path.is_dir():
        variant = path.absolute()
        return CacheReader(
            variant.parents[1],
            variant.parent.name,
            variant=variant.name,
            missing="skip",
            allow_failed=arguments.allow_failed,
        )
    if arguments.asset is None:
        raise MissingInputError(f"{name}: say with --asset which of its caches ({', '.join(CACHES)})")
    return CacheReader(recipe_folder_of(name), arguments.asset, missing="skip", allow_failed=arguments.allow_failed)


def _is_above(found: Comparison, most: float) -> bool:
    measure = found.measures.get(found.ordered_by, Measure())
    differs = bool(found.only_in_first or found.only_in_second or found.other_tokens)
    return differs or measure.n_not_finite > 0 or measure.mean is None or measure.mean > most


def _lines(found: Comparison, reader: CacheReader, tokenizer: Path | None) -> list[str]:
    one, other = found.variants
    lines = [f"{found.asset}: {one} and {other}, {found.n_documents:,} documents, {found.n_positions:,} positions"]
    for words, keys in (
        ("only in the first", found.only_in_first),
        ("only in the second", found.only_in_second),
        ("of other tokens, not compared", found.other_tokens),
    ):
        if keys:
            lines.append(f"  {len(keys):,} documents {words}: {', '.join(named(keys))}")
    width = max(map(len, found.measures), default=0)
    for name, measure in found.measures.items():
        mean = "-" if measure.mean is None else f"{measure.mean:.6g}"
        broken = f"  {measure.n_not_finite:,} are NaN or infinite" if measure.n_not_finite else ""
        lines.append(f"  {name:<{width}}  mean {mean}  largest {measure.largest:.6g}{broken}")
    decode, _ = decoder_of(tokenizer, reader.manifests[0].provenance.get("tokenizer"))
    rows = {key: row for row, key in enumerate(reader.keys())} if found.worst else {}
    for document in found.worst:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in document.numbers.items())
        lines.append(f"  {document.document_id}  [{document.partition_key}]  {numbers}")
        ids = reader[rows[document.partition_key, document.document_id]]["input_ids"][:SHOWN_TOKENS].tolist()
        lines.append(f"    {quoted(decode(ids)) if decode is not None else ' '.join(map(str, ids))} …")
    return lines


def _json(found: Comparison) -> dict[str, Any]:
    record = dataclasses.asdict(found)
    for name, measure in found.measures.items():
        record["measures"][name]["mean"] = measure.mean
    return record


def _progress() -> Callable[[int, int], None]:
    progress = Progress()
    return lambda done, total: progress.tell(lambda _: f"{done:,} of {total:,} documents")


DIFF = Subcommand(
    name="diff",
    description="how far apart two caches of the same documents are: KL, top-1, cosine; the worst documents",
    add_arguments=_arguments,
    run=_run,
)
