"""`kd-assets recode`: caches in another codec, made of those that are there and without the teacher."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.commands.base import Subcommand, control_plane, show, show_json
from kd_assets.commands.progress import Progress
from kd_assets.contract import Output
from kd_assets.durable import storage_errors
from kd_assets.errors import FailedCheckError, KdAssetsError, NoSourceError, StorageUnavailableError
from kd_assets.store import Manifest, failed_check, set_head, variants_of
from kd_assets.store.current_variants import chosen_variant
from kd_assets.store.layout import recipe_folder_of
from kd_assets.store.reading.selection import select_partitions
from kd_assets.store.recoding.recode import RecodingProgress, recode, source_in
from kd_assets.worker.provenance import task_provenance

MOST_REFUSED = 5
"""Results that an error names one by one."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="its name in the dg project around here")
    parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="CACHE=CODEC",
        help="such as topk=compact or hidden_states=split; more than once for both (default: as the recipe says)",
    )
    parser.add_argument("--without-logsumexp", action="store_true", help="leave that out of the coded top-k cache")
    parser.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made of what, and write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """Recode one result after the other, with lines of progress on stderr; 0 when all that was asked for is there. What
    cannot be made is named at the end, after all that can."""
    planned = control_plane("kd_assets.orchestration.planning.planned_recoding")
    platforms = control_plane("kd_assets.orchestration.platform")
    recipe, assets = planned.with_codecs(
        control_plane("kd_assets.components").load_recipe(arguments.recipe),
        arguments.codec,
        without_logsumexp=arguments.without_logsumexp,
    )
    platform = platforms.Platform.from_environment()
    control_plane("kd_assets.orchestration.one_project").require_no_other_project(recipe, platform)
    planner = control_plane("kd_assets.orchestration.materialize").planner_of(
        recipe, platform, say=lambda line: show(line, stream=sys.stderr)
    )
    keys = select_partitions(planner.current_plan().keys, arguments.partitions)
    records: list[dict[str, Any]] = []
    failed: list[Exception] = []
    found: list[_Found] = []
    needed = 0
    for one in planned.recodings(planner, keys, assets):
        if isinstance(one, str):
            failed.append(NoSourceError(one))
            continue
        records.append(_as_planned(one, planned.form_in_words(one.wanted)))
        if (error := _why_not(one)) is not None:
            failed.append(error)
            continue
        needed += 0 if one.there is not None else max(one.bytes_after - one.bytes_finished, 0)
        source = None if one.there is not None else Path(one.search.source.output.path)
        found.append(_Found(record=records[-1], wanted=one.wanted, source=source))
    if not arguments.dry_run:
        _require_room(needed, planner.recipe_folder)
        made_by = {"code_commit": platforms.code_commit(), **task_provenance()}
        for result in found:
            try:
                _carry_out(result, made_by)
            except KdAssetsError as e:
                result.record.update(state="failed", why=str(e))
                failed.append(e)
    variants = {} if arguments.dry_run else _several_variants(planner.recipe_folder, records)
    if arguments.json:
        show_json({"recipe": recipe.name, "dry_run": arguments.dry_run, "results": records, "variants": variants})
    else:
        show(*_lines(records, dry_run=arguments.dry_run), *_variant_lines(planner.recipe_folder, records, variants))
    if failed:
        raise _as_one(failed)
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A result that is there or can be made, without the manifests: there may be many."""

    record: dict[str, Any]
    wanted: Output
    source: Path | None
    """The folder of what it is made of; None where it is there."""


def _why_not(one: Any) -> Exception | None:
    """Why the command cannot give a result; None where it can, or it is there and good. `one`: see `_as_planned`."""
    if one.there is not None:
        return None if (why := _why_bad(one)) is None else FailedCheckError(why)
    if one.search.source is None:
        return NoSourceError(f"{one.asset} of {one.partition_key} cannot be recoded: {one.search.why_none}")
    return None


def _why_bad(one: Any) -> str | None:
    if (why := failed_check(one.there)) is None:
        return None
    return (
        f"{one.asset} of {one.partition_key} is there already, and never current: {why}. Put it aside (kd-assets "
        f"quarantine {recipe_folder_of(Path(one.wanted.path))} {one.partition_key} --assets {one.asset} --variant "
        f"{one.wanted.variant} --why …), and what is not to be trusted of its source, too"
    )


def _as_planned(one: Any, form: str) -> dict[str, Any]:
    """What the command says of a result before anything is made. `one`: a `planned_recoding.Recoding`."""
    record = {"asset": one.asset, "partition_key": one.partition_key, "codec": form, "folder": one.wanted.path}
    record |= {"variant": one.wanted.variant}
    if one.there is not None:
        if (why := _why_bad(one)) is not None:
            return record | {"state": "failed", "why": why}
        return record | {"state": "there", "bytes": one.bytes_after}
    if one.search.source is None:
        return record | {"state": "no source", "why": one.search.why_none}
    source = one.search.source
    return record | {
        "state": "to be made",
        "from_codec": source.form.in_words,
        "from_folder": source.output.path,
        "bytes_before": source.manifest.n_bytes,
        "bytes": one.bytes_after,
    }


def _carry_out(found: _Found, made_by: dict[str, Any]) -> None:
    """Make a result, or, where it is there, make it its partition's current one, as its reuse by a run does."""
    wanted, record = found.wanted, found.record
    if found.source is None:
        set_head(Path(wanted.path))
        return
    progress, key = Progress(), record["partition_key"]

    def tell(done: RecodingProgress) -> None:
        words = functools.partial(progress_line, wanted.asset, key, done)
        progress.tell(words, is_last=done.n_parts == done.of_parts)

    manifest = recode(source_in(found.source, wanted), wanted, made_by=made_by, on_part=tell)
    _require_passed(wanted.path, manifest)
    record |= {"state": "made", "bytes": manifest.n_bytes}
    if "recoded" in manifest.checks:  # else somebody else has made it meanwhile, by the teacher
        record["is_exact"] = manifest.checks["recoded"]["is_exact"]


def _require_passed(path: str, manifest: Manifest) -> None:
    if why := failed_check(manifest):
        raise FailedCheckError(f"{path} was made, is kept to be looked at and is never current: {why}")


def _require_room(needed: int, folder: Path) -> None:
    """Raise StorageUnavailableError where what is to be made will not fit, before any of it is made."""
    with storage_errors(folder, "look at"):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageUnavailableError(
            f"{folder}: about {needed:,} bytes are to be made, and {free:,} are free: free some space, or say fewer "
            "--partitions"
        )


def _of_readers(recipe_folder: Path, asset: str, names: Sequence[str]) -> str:
    """What a reader gets that names no variant of several."""
    current = chosen_variant(recipe_folder, asset, names)
    return "are refused" if current is None else f"get {current}, that of the recipe's last run"


def _several_variants(recipe_folder: Path, records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Asset → its variants that have current results, where they are several."""
    assets = dict.fromkeys(record["asset"] for record in records)
    found = {asset: sorted(variants_of(recipe_folder / asset)) for asset in assets}
    return {asset: variants for asset, variants in found.items() if len(variants) > 1}


def _variant_lines(
    recipe_folder: Path, records: Sequence[dict[str, Any]], variants: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a reader must be told from now on."""
    lines = []
    for asset, names in variants.items():
        own, codec = next((r["variant"], r["codec"]) for r in records if r["asset"] == asset)
        others = ", ".join(name for name in names if name != own)
        lines.append(
            f"{asset}: variant {own} is {codec}, and {others} is there, too. Readers that name none "
            f'{_of_readers(recipe_folder, asset, names)}: name this one (variant="{own}" of CacheReader, '
            f'variants={{"{asset}": "{own}"}} of the data set, --variant {own} of kd-assets serve, --variant '
            f"{asset}={own} of kd-assets export), or set the codec in the recipe and materialize it, which makes "
            f"nothing anew; kd-assets gc {recipe_folder} --dry-run says what could be deleted"
        )
    return lines


def progress_line(asset: str, partition_key: str, progress: RecodingProgress, elapsed_s: float) -> str:
    rate = progress.n_tokens / max(elapsed_s, 1e-3)
    return (
        f"recode: {asset} of {partition_key}: part {progress.n_parts:,} of {progress.of_parts:,}, "
        f"{progress.n_tokens:,} of {progress.of_tokens:,} tokens, {progress.n_bytes:,} bytes, {rate:,.0f} tokens/s"
    )


def _lines(records: Sequence[dict[str, Any]], *, dry_run: bool) -> list[str]:
    lines = []
    for record in records:
        what = f"{record['asset']} of {record['partition_key']} as {record['codec']}"
        match record["state"]:
            case "there":
                lines.append(f"{what}: is there already, nothing to do ({record['bytes']:,} bytes)")
            case "made" | "to be made":
                about = "about " if record["state"] == "to be made" else ""
                lines.append(
                    f"{what}: {record['state']} from {record['from_codec']}, {record['bytes_before']:,} bytes before, "
                    f"{about}{record['bytes']:,} after"
                )
            case state:
                lines.append(f"{what}: {state}: {record['why']}")
    changed = [record for record in records if record["state"] in ("made", "to be made")]
    before, after = (sum(record[name] for record in changed) for name in ("bytes_before", "bytes"))
    words = "would be recoded" if dry_run else "recoded, each part decoded again and compared with its source"
    about, nothing = ("about ", ". Nothing was written") if dry_run else ("", "")
    lines.append(
        f"{len(changed)} results {words}: {before:,} bytes before, {about}{after:,} after; what they are made of "
        f"stays{nothing}"
    )
    return lines


def _as_one(failed: Sequence[Exception]) -> Exception:
    """The one error, or one of its class that names the first of many."""
    if len(failed) == 1:
        return failed[0]
    more = f"; and {len(failed) - MOST_REFUSED} more" if len(failed) > MOST_REFUSED else ""
    return type(failed[0])(f"{len(failed)} results: {'; '.join(map(str, failed[:MOST_REFUSED]))}{more}")


RECODE = Subcommand(
    name="recode",
    description="make caches of another codec from those that are there, without the teacher; goes on after a kill",
    add_arguments=_arguments,
    run=_run,
)
