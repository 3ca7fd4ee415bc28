"""What a run says of what it could not have: a Dagster Failure that names each partition, its cause and its log.

The end of a log stands in the event itself, since browsers open no file of the service node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from kd_assets.cards.words import counted
from kd_assets.errors import printable
from kd_assets.orchestration.driving.results import FailedResult
from kd_assets.orchestration.recording.job_table import failures_in_words
from kd_assets.orchestration.retries import FailureClass

MOST_LINES = 50
"""Of causes in a failure's description; its metadata have them all."""
MOST_LOG_TAILS = 5
"""Of as many logs the last lines are shown; the paths of all are."""


def failure_report(
    recipe_name: str,
    failed: Sequence[FailedResult],
    *,
    checks: Mapping[str, Sequence[str]],
    failures: Mapping[FailureClass, int],
    node_faults: Sequence[str],
) -> dg.Failure | None:
    """The failure of a run; None where nothing failed.

    `checks`: partition → checks that failed, in words. `failures`: what kept tasks from their results, by class.
    """
    if not failed and not checks:
        return None
    lines = failed_in_words(failed)
    lines += [f"{key}: {message}" for key, messages in sorted(checks.items()) for message in messages]
    failed_partitions = sorted({f.partition_key for f in failed} | set(checks))
    metadata: dict[str, Any] = {
        "failed_partitions": dg.MetadataValue.json(failed_partitions),
        "causes": dg.MetadataValue.md("\n".join(f"- {as_markdown(line)}" for line in lines)),
    }
    if failures:
        metadata["failures_by_class"] = failures_in_words(failures)
    if node_faults:
        metadata["nodes_at_fault"] = "; ".join(node_faults)
    if logs := {str(f.log_file): f.log_tail for f in failed if f.log_file is not None}:
        metadata["logs"] = dg.MetadataValue.json(sorted(logs))
        if tails := {path: tail for path, tail in sorted(logs.items()) if tail}:
            metadata["log_tails"] = dg.MetadataValue.md(log_tails_markdown(tails))
    return dg.Failure(
        description=f"{counted(len(failed_partitions), 'partition')} not done in recipe {recipe_name}:\n"
        + "\n".join(lines[:MOST_LINES]),
        metadata=metadata,
    )


def failed_in_words(failed: Iterable[FailedResult]) -> list[str]:
    """One line a cause, with the partitions and assets it kept from being done."""
    grouped: dict[str, list[FailedResult]] = {}
    for result in failed:
        grouped.setdefault(result.cause, []).append(result)
    lines = []
    for cause, results in grouped.items():
        keys = sorted({r.partition_key for r in results})
        named = ", ".join(keys) if len(keys) <= 5 else f"{keys[0]} … {keys[-1]} ({counted(len(keys), 'partition')})"
        safe_cause = "\n".join(map(printable, cause.splitlines()))
        lines.append(f"{named} ({', '.join(dict.fromkeys(r.asset for r in results))}): {safe_cause}")
    return lines


def as_markdown(text: str) -> str:
    """Text that Markdown shows as it is: what a file says is no link, no picture and no HTML of ours."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~&$])", r"\\\1", text)


def log_tails_markdown(tails: Mapping[str, str]) -> str:
    """Path and last lines of the first MOST_LOG_TAILS logs, each as it is in its file."""
    shown = []
    for path, tail in list(tails.items())[:MOST_LOG_TAILS]:
        text = "\n".join(map(printable, tail.splitlines()))
        # A line of the log must not end the block that it stands in.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        shown.append(f"{as_markdown(path)}\n\n{fence}text\n{text}\n{fence}")
    if n_more := max(0, len(tails) - MOST_LOG_TAILS):
        shown.append(f"and {n_more} more")
    return "\n\n".join(shown)
