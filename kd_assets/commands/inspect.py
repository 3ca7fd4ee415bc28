"""`kd-assets inspect`: what is in a cache, and a few of its documents readable by eye."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from kd_assets.cards.documents import document_lines
from kd_assets.cards.tokens import Decode, decoder_of
from kd_assets.cards.words import pairs
from kd_assets.commands.base import Subcommand, count, show, show_json
from kd_assets.store.ragged_topk import mean_kept_tokens
from kd_assets.store.reading.summary import CacheSummary, DocumentView, Inspection, inspect, view_documents
from kd_assets.store.vocabulary import mean_outside_mass


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a result, an asset's or recipe's folder, or a store's root")
    parser.add_argument("--documents", type=count, default=2, metavar="N", help="documents to show of each cache (2)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="folder that holds tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path)
    if arguments.json:
        show_json(_inspection_json(found, arguments))
        return 0
    for cache in found.caches:
        show(*_cache_lines(cache))
        if arguments.documents and cache.has_documents:
            decode, why_not = decoder_of(arguments.tokenizer, _tokenizer_of(cache))
            if why_not is not None:
                show(f"  (token ids, no text: {why_not})")
            for view in view_documents(cache, arguments.documents):
                show(*document_lines(view, decode))
        show("")
    for folder, why in found.failed.items():
        show(f"{folder} is not current: {why}")
    if found.without_head:
        number, first = len(found.without_head), found.without_head[0]
        show(f"{number} are committed and no head names them, such as {first}: materialize them, which reuses them")
    if found.n_superseded:
        show(f"{found.n_superseded} older results are on disk beside the current ones")
    if found.unfinished:
        show(f"{len(found.unfinished)} unfinished, such as {found.unfinished[0]}")
    return 0


def _inspection_json(found: Inspection, arguments: argparse.Namespace) -> dict[str, Any]:
    caches = []
    for cache in found.caches:
        record = dataclasses.asdict(cache)
        if arguments.documents:
            decode, why_not = decoder_of(arguments.tokenizer, _tokenizer_of(cache))
            views = view_documents(cache, arguments.documents)
            record["documents"] = [_document_json(view, decode) for view in views]
            record["no_text_because"] = why_not
        caches.append(record)
    return {
        "path": str(found.path),
        "caches": caches,
        "n_superseded": found.n_superseded,
        "failed": found.failed,
        "without_head": [str(folder) for folder in found.without_head],
        "unfinished": [str(folder) for folder in found.unfinished],
    }


def _document_json(view: DocumentView, decode: Decode | None) -> dict[str, Any]:
    record = dataclasses.asdict(view)
    if decode is not None:
        record["text"] = decode(view.input_ids)
        for position, raw in zip(view.positions, record["positions"], strict=True):
            raw["token"], raw["target"] = decode([position.token_id]), decode([position.target_id])
            raw["top_text"] = [decode([token_id]) for token_id, _ in position.top]
    return record


def _cache_lines(cache: CacheSummary) -> list[str]:
    keys = cache.partition_keys
    partitions = keys[0] if len(keys) == 1 else f"{keys[0]} … {keys[-1]}"
    planned = "" if cache.n_planned is None else f", {cache.n_planned} planned"
    rows = [("partitions", f"{len(keys)}{planned}  ({partitions})")]
    if cache.left_out:
        named = "; ".join(f"{key}: {why}" for key, why in list(cache.left_out.items())[:3])
        more = f"; and {len(cache.left_out) - 3} more" if len(cache.left_out) > 3 else ""
        rows.append(("not read", f"{len(cache.left_out)}  ({named}{more})"))
    rows.append(("documents", f"{cache.n_documents:,}"))
    rows.append(("tokens", f"{cache.n_tokens:,}"))
    per_token = "" if cache.bytes_per_token is None else f"  ({cache.bytes_per_token:,.1f} a token)"
    rows.append(("bytes", f"{cache.n_bytes:,}{per_token}"))
    for label, values in (("parameters", cache.params), ("identity", cache.identity), ("statistics", cache.stats)):
        if values:
            rows.append((label, pairs(values)))
    if (outside := mean_outside_mass(cache.stats)) is not None:
        most = cache.stats["max_outside_mass"]
        rows.append(("outside mass", f"{outside:.6g} on average, {most:.6g} at most (of ids that no student has)"))
    if (kept := mean_kept_tokens(cache.stats)) is not None:
        rows.append(("tokens kept", f"{kept:.2f} of a position on average (top_p)"))
    teacher = cache.provenance.get("teacher")
    if teacher:
        rows.append(("teacher", teacher if isinstance(teacher, str) else pairs(teacher)))
    recoded_from = cache.provenance.get("recoded_from")
    if isinstance(recoded_from, dict):
        rows.append(("recoded", f"from {recoded_from.get('codec')}, such as {recoded_from.get('folder')}"))
    for name, record in cache.checks.items():
        others = {k: v for k, v in record.items() if k not in ("n_partitions", "n_passed", "measured_on")}
        passed = f"passed in {record['n_passed']} of {record['n_partitions']} partitions"
        passed += f", measured on {record['measured_on']}" if "measured_on" in record else ""
        rows.append((f"check {name}", f"{passed}  {pairs(others)}".rstrip()))
    rows.append(("committed", _period(cache)))
    width = max(len(label) for label, _ in rows)
    title = f"{cache.recipe}/{cache.asset}  variant {cache.variant}"
    return [title, *(f"  {label:<{width}}  {value}" for label, value in rows)]


def _period(cache: CacheSummary) -> str:
    made = cache.first_created_at
    if cache.last_created_at != made:
        made += f" to {cache.last_created_at}"
    host, commit = cache.provenance.get("host"), cache.provenance.get("code_commit")
    return made + (f" on {host}" if host else "") + (f" by code {str(commit)[:12]}" if commit else "")


def _tokenizer_of(cache: CacheSummary) -> object:
    return cache.provenance.get("tokenizer") or cache.identity.get("tokenizer")


INSPECT = Subcommand(
    name="inspect",
    description="what is in a cache, and a few of its documents readable by eye",
    add_arguments=_inspect_arguments,
    run=_inspect,
)
