"""`kd-assets`: looks at results, and at what a run would do. One function a subcommand, all listed in `COMMANDS`.

`inspect` and `verify` need what the store needs, and the `tokenizers` library to show text where it is installed;
`plan`, `preview` and `doctor` belong to the control plane, which is loaded by name: the others work without dagster.
Errors are one line on stderr; the exit status is that of the error (see `kd_assets.errors`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kd_assets.errors import EXIT_FAILED, KdAssetsError, MissingInputError, printable
from kd_assets.export.command import add_export_arguments, run_export
from kd_assets.store.checking.report import VerifyReport
from kd_assets.store.checking.verify import verify
from kd_assets.store.reading.summary import CacheSummary, DocumentView, Inspection, Position, inspect, view_documents

EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: what a shell reports of a command whose reader went away."""

Decode = Callable[[Sequence[int]], str]
"""Text of token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subcommand:
    """A subcommand: its name, its help, what it adds to the parser, and what it does (returns the exit status)."""

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# ---------------------------------------------------------------------------------------------------------- inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a result, an asset's or recipe's folder, or a store's root")
    parser.add_argument("--documents", type=_count, default=2, metavar="N", help="documents to show of each cache (2)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="folder that holds tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path)
    if arguments.json:
        _show_json(_inspection_json(found, arguments))
        return 0
    for cache in found.caches:
        _show(*_cache_lines(cache))
        if arguments.documents and cache.has_documents:
            decode, why_not = _decoder(arguments.tokenizer, cache)
            if why_not is not None:
                _show(f"  (token ids, no text: {why_not})")
            for view in view_documents(cache, arguments.documents):
                _show(*_document_lines(view, decode))
        _show("")
    for folder, why in found.failed.items():
        _show(f"{folder} is not current: {why}")
    if found.without_head:
        number, first = len(found.without_head), found.without_head[0]
        _show(f"{number} are committed and no head names them, such as {first}: materialize them, which reuses them")
    if found.n_superseded:
        _show(f"{found.n_superseded} older results are on disk beside the current ones")
    if found.unfinished:
        _show(f"{len(found.unfinished)} unfinished, such as {found.unfinished[0]}")
    return 0


def _inspection_json(found: Inspection, arguments: argparse.Namespace) -> dict[str, Any]:
    caches = []
    for cache in found.caches:
        record = dataclasses.asdict(cache)
        if arguments.documents:
            decode, why_not = _decoder(arguments.tokenizer, cache)
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
            rows.append((label, _pairs(values)))
    teacher = cache.provenance.get("teacher")
    if teacher:
        rows.append(("teacher", teacher if isinstance(teacher, str) else _pairs(teacher)))
    for name, record in cache.checks.items():
        others = {k: v for k, v in record.items() if k not in ("n_partitions", "n_passed")}
        passed = f"passed in {record['n_passed']} of {record['n_partitions']} partitions"
        rows.append((f"check {name}", f"{passed}  {_pairs(others)}".rstrip()))
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


def _document_lines(view: DocumentView, decode: Decode | None) -> list[str]:
    more = " …" if view.n_tokens > len(view.input_ids) else ""
    shown = _quoted(decode(view.input_ids)) if decode is not None else " ".join(map(str, view.input_ids))
    extra = f"  {_pairs(view.fields)}" if view.fields else ""
    lines = [
        f"  {view.document_id}  [{view.partition_key}]  {view.n_tokens} tokens, {view.n_loss_tokens} trained{extra}",
        f"    {shown}{more}",
    ]
    lines += [_position_line(position, decode) for position in view.positions]
    for name, vector in view.vectors.items():
        shape = " × ".join(map(str, vector["shape"]))
        values = ", ".join(f"{value:.4g}" for value in vector["first_values"])
        lines.append(f"    {name}: {shape}, first vector [{values}, …] of norm {vector['first_norm']:.4g}")
    return lines


def _position_line(position: Position, decode: Decode | None) -> str:
    def token(token_id: int) -> str:
        return str(token_id) if decode is None else _quoted(decode([token_id]))

    top = ", ".join(f"{token(token_id)} {probability:.3f}" for token_id, probability in position.top[:5])
    target = f"{token(position.target_id)} {position.target_probability:.3f}"
    return f"    after {token(position.token_id)} (position {position.position}) came {target}; teacher: {top}"


def _decoder(given: Path | None, cache: CacheSummary) -> tuple[Decode | None, str | None]:
    """A function from token ids to text, or None and the reason. A tokenizer that was named by hand must be there."""
    named = given if given is not None else cache.provenance.get("tokenizer") or cache.identity.get("tokenizer")
    if not isinstance(named, (str, Path)):
        return None, "the manifest names no tokenizer; give --tokenizer"
    path = Path(named)
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        if given is not None:
            raise MissingInputError(f"no tokenizer.json at {given}")
        return None, f"no tokenizer.json in {named} on this machine; give --tokenizer"
    try:
        # By name: the library is an extra that a machine which only verifies does not need.
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        return None, "the tokenizers library is not installed: pip install tokenizers"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        return None, f"{file} is no tokenizer: {e}"

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return decode, None


# ----------------------------------------------------------------------------------------------------------- verify


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="results, recipes or stores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything is wrong; each problem is a line that names its file."""
    if missing := [path for path in arguments.paths if not path.exists()]:  # before hours of hashing the others
        raise MissingInputError(f"{missing[0]} does not exist")
    reports = [verify(path) for path in arguments.paths]
    ok = all(report.ok for report in reports)
    if arguments.json:
        _show_json({"ok": ok, "reports": [_report_json(report) for report in reports]})
    else:
        for report in reports:
            _show(*_report_lines(report))
    return 0 if ok else EXIT_FAILED


def _report_json(report: VerifyReport) -> dict[str, Any]:
    return {"ok": report.ok} | dataclasses.asdict(report)


def _report_lines(report: VerifyReport) -> list[str]:
    lines = [f"{problem.kind}: {problem.message}" for problem in report.problems]
    lines += [f"note, {note.kind}: {note.message}" for note in report.notes]
    counts = (
        f"{report.n_results} results, {report.n_parts} parts, {report.n_documents:,} documents, "
        f"{report.n_tokens:,} tokens, {report.n_bytes:,} bytes"
    )
    found = "all hashes and counts are right" if report.ok else f"{len(report.problems)} problems"
    return [*lines, f"{report.path}: {counts}: {found}"]


# ---------------------------------------------------------------------------------------------------- control plane


def _control_plane(module: str) -> Any:
    """A module of the planes that need dagster. Raises MissingInputError where its packages are not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "kd_assets":
            raise
        raise MissingInputError(
            f"this command needs {e.name}, which is not installed here: run it on the service node, or "
            "pip install 'kd-assets[control]'"
        ) from e


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a folder of kd_assets/defs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _plan(arguments: argparse.Namespace) -> int:
    """Exit 1 when the caches do not fit where they will lie."""
    bills = _control_plane("kd_assets.diagnose.bill")
    recipe = _control_plane("kd_assets.components").load_recipe(arguments.recipe)
    bill = bills.bill_of(recipe, _control_plane("kd_assets.orchestration.platform").Platform.from_environment())
    if arguments.json:
        _show_json(bill.to_json())
    else:
        _show(*bills.text_lines(bill))
    return 0 if bills.fits(bill) else EXIT_FAILED


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a folder of kd_assets/defs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--partitions", metavar="A..B", help="from shard A to shard B; or A,C; or one (default: all)")
    which.add_argument("--all", action="store_true", help="all shards of the current plan")
    parser.add_argument("--assets", nargs="+", metavar="NAME", help="such as topk_cache (default: all that need jobs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _preview(arguments: argparse.Namespace) -> int:
    previews = _control_plane("kd_assets.diagnose.preview")
    recipe = _control_plane("kd_assets.components").load_recipe(arguments.recipe)
    platform = _control_plane("kd_assets.orchestration.platform").Platform.from_environment()
    shown = previews.preview(recipe, platform, partitions=arguments.partitions, assets=arguments.assets)
    if arguments.json:
        _show_json(shown.to_json())
    else:
        _show(*previews.text_lines(shown))
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="check its requests, weights and space, too")
    parser.add_argument("--no-job", action="store_true", help="submit no test job to the cluster")
    parser.add_argument(
        "--verify-weights", action="store_true", help="read the teacher's weights and check their hashes"
    )
    parser.add_argument("--wait", type=_count, default=120, metavar="SECONDS", help="for the test job to start (120)")


def _doctor(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything fails; each finding is a line, printed as soon as it is known."""
    doctor = _control_plane("kd_assets.diagnose.doctor")
    load_recipe = _control_plane("kd_assets.components").load_recipe
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    platform = _control_plane("kd_assets.orchestration.platform").Platform.from_environment()
    ok = True
    for finding in doctor.examine(
        recipe,
        platform,
        test_job=not arguments.no_job,
        wait_s=arguments.wait,
        verify_weights=arguments.verify_weights,
    ):
        _show(str(finding))
        ok = ok and finding.status is not doctor.Status.FAIL
    return 0 if ok else EXIT_FAILED


# ------------------------------------------------------------------------------------------------------------- main

COMMANDS: tuple[Subcommand, ...] = (
    Subcommand(
        name="inspect",
        description="what is in a cache, and a few of its documents readable by eye",
        add_arguments=_inspect_arguments,
        run=_inspect,
    ),
    Subcommand(
        name="verify",
        description="check every hash and every count; exit 1 with the file named when something is wrong",
        add_arguments=_verify_arguments,
        run=_verify,
    ),
    Subcommand(
        name="export",
        description="write a recipe's caches as files that a trainer reads; goes on where a killed export left off",
        add_arguments=add_export_arguments,
        run=run_export,
    ),
    Subcommand(
        name="plan",
        description="what the plan would be now and what it would cost; writes nothing; exit 1 when it does not fit",
        add_arguments=_plan_arguments,
        run=_plan,
    ),
    Subcommand(
        name="preview",
        description="what materializing would submit now, command lines and all; submits nothing",
        add_arguments=_preview_arguments,
        run=_preview,
    ),
    Subcommand(
        name="doctor",
        description="check what jobs need, the cluster included; exit 1 with the remedy named when something fails",
        add_arguments=_doctor_arguments,
        run=_doctor,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kd-assets", description="Teacher caches for LLM distillation.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.description, description=command.description)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except KdAssetsError as e:
        _show(f"kd-assets: {' '.join(str(e).split())}", stream=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


def _show(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines, with escapes in the place of all that is no printable character."""
    print("\n".join(printable(line) for line in lines), file=stream or sys.stdout, flush=True)


def _show_json(record: Any) -> None:
    """Print one JSON object, in ASCII for the same reason."""
    print(json.dumps(record, indent=1, default=str))


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _pairs(values: dict[str, Any]) -> str:
    return "  ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and len(value) == 64:  # a hash
        return f"{value[:12]}…"
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
