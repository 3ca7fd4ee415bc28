"""`kd-assets verify`: every hash and every count, and documents computed again."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_assets.cards.words import pairs
from kd_assets.commands.base import Subcommand, compute_plane, count, show, show_json
from kd_assets.errors import EXIT_FAILED, MissingInputError
from kd_assets.store.checking.report import VerifyReport
from kd_assets.store.checking.verify import verify
from kd_assets.store.layout import MANIFEST_NAME, result_folders
from kd_assets.store.manifest import read_head, without_non_finite


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="results, recipes or stores")
    parser.add_argument(
        "--recompute", type=count, default=0, metavar="N", help="documents of each cache to compute again (none)"
    )
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="where the teacher lies now, to recompute")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... to recompute (a GPU where there is one)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample to recompute (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(arguments: argparse.Namespace) -> int:
    """Exit 1 when anything is wrong; each problem is a line that names its file."""
    if missing := [path for path in arguments.paths if not path.exists()]:  # before hours of hashing the others
        raise MissingInputError(f"{missing[0]} does not exist")
    reports = [verify(path) for path in arguments.paths]
    if not arguments.json:
        for report in reports:
            show(*_report_lines(report))
    recomputed = _recomputed(reports, arguments) if arguments.recompute else []
    ok = all(report.ok for report in reports) and all(result.passed for result in recomputed)
    if arguments.json:
        of_results = [{"path": str(r.folder), "asset": r.asset, **r.record} for r in recomputed]
        found = {"ok": ok, "reports": [_report_json(report) for report in reports]}
        show_json(without_non_finite(found | ({"recomputed": of_results} if arguments.recompute else {})))
    return 0 if ok else EXIT_FAILED


def _recomputed(reports: Sequence[VerifyReport], arguments: argparse.Namespace) -> list[Any]:
    """Documents of the current results that are whole, by the plain path (see `kd_assets.teacher.verification`)."""
    recompute = compute_plane("kd_assets.teacher.verification").recompute_stored
    found = []
    for result in recompute(
        [folder for report in reports for folder in _whole_results(report)],
        n_documents=arguments.recompute,
        seed=arguments.seed,
        teacher_folder=arguments.teacher,
        device=arguments.device,
        warn=lambda message: show(message, stream=sys.stderr),
    ):
        found.append(result)
        if not arguments.json:
            numbers = {name: value for name, value in result.record.items() if name not in ("passed", "document_ids")}
            show(f"{result.folder}: recomputed, {'as it is stored' if result.passed else 'DIFFERS'}: {pairs(numbers)}")
    if not arguments.json:
        n_differ = sum(not result.passed for result in found)
        show(f"{len(found)} results recomputed, {n_differ} differ beyond tolerance")
    return found


def _whole_results(report: VerifyReport) -> Iterator[Path]:
    """The results that readers are given, or that was named itself, of which no file is wrong."""
    for folder in result_folders(report.path):
        is_read = folder == report.path or read_head(folder.parent) == folder
        is_committed = (folder / MANIFEST_NAME).is_file()
        if is_read and is_committed and not any(p.path.is_relative_to(folder) for p in report.problems):
            yield folder


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


VERIFY = Subcommand(
    name="verify",
    description="check every hash and every count; exit 1 with the file named when something is wrong",
    add_arguments=_verify_arguments,
    run=_verify,
)
