"""`kd-assets verify`: every hash and every count."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from kd_assets.commands.base import Subcommand, show, show_json
from kd_assets.errors import EXIT_FAILED, MissingInputError
from kd_assets.store.checking.report import VerifyReport
from kd_assets.store.checking.verify import verify


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
        show_json({"ok": ok, "reports": [_report_json(report) for report in reports]})
    else:
        for report in reports:
            show(*_report_lines(report))
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


VERIFY = Subcommand(
    name="verify",
    description="check every hash and every count; exit 1 with the file named when something is wrong",
    add_arguments=_verify_arguments,
    run=_verify,
)
