"""A bill in words: its parts as rows, and whether the caches fit."""

from __future__ import annotations

from kd_assets.cards.words import bytes_in_words, counted, energy, number
from kd_assets.contract import EXPORTS
from kd_assets.orchestration.billing.bill import Bill, CacheLine, SourceLine, TasksLine

Row = tuple[str, str, str]
"""What, how much, and what that rests on."""


def rows(bill: Bill) -> list[Row]:
    """All but the sources."""
    teacher = bill.teacher
    hours = "not known" if teacher.device_hours is None else f"{number(teacher.device_hours)} {teacher.device}-hours"
    return [
        (
            "plan",
            f"{counted(bill.n_shards, 'shard')}, {counted(bill.n_documents, 'document')}, "
            f"about {bill.n_tokens:,} tokens",
            "",
        ),
        *(_cache_row(line) for line in bill.caches),
        ("teacher", flops_in_words(teacher.flops), f"{teacher.n_tokens:,} tokens; {teacher.flops_rest_on}"),
        ("time", hours, teacher.hours_rest_on),
        ("energy", "not known" if teacher.joules is None else energy(teacher.joules), teacher.joules_rest_on),
        *(_tasks_row(line) for line in bill.tasks),
        ("space", space_in_words(bill), bill.folder),
    ]


def source_row(line: SourceLine) -> Row:
    left = [f"{n:,} {words}" for n, words in ((line.n_duplicates, "copies left out"), (line.n_left, "left over")) if n]
    rate = f"{line.bytes_per_token:.2f} bytes a token, {'measured' if line.is_measured else 'assumed'}"
    facts = [rate, f"licence {line.licence}", *([f"revision {line.revision}"] if line.revision else []), *left]
    return (
        f"source {line.name}",
        f"{counted(line.n_documents, 'document')}, about {line.n_tokens:,} tokens",
        "; ".join([*facts, line.path]),
    )


def space_in_words(bill: Bill) -> str:
    free = "free space not known" if bill.free_bytes is None else f"{bytes_in_words(bill.free_bytes)} free"
    there = sum(line.bytes_there for line in bill.caches)
    unknown = [str(line.asset) for line in bill.caches if line.n_bytes is None]
    without = f", without {' and '.join(unknown)}, whose size is not known" if unknown else ""
    return f"{bytes_in_words(bill.bytes_left)} to be written{without}; {bytes_in_words(there)} there; {free}"


def why_it_does_not_fit(bill: Bill) -> str | None:
    """What is missing and what to change; None where the caches fit."""
    if not bill.bytes_missing or bill.free_bytes is None:
        return None
    largest = max(bill.caches, key=lambda line: line.n_bytes or 0)
    choices: dict[str, str] = {
        "topk_cache": "codec: compact of caches.topk, a smaller k or a smaller max_length",
        "hidden_state_cache": "fewer caches.hidden_states.blocks (or final states) or a smaller max_length",
        "embedding_cache": "no caches.embeddings",
    }
    less = "fewer exports" if largest.asset in EXPORTS else choices.get(largest.asset, "a smaller max_length")
    return (
        f"the caches do not fit: {bytes_in_words(bill.bytes_left)} are still to be written to {bill.folder}, and "
        f"{bytes_in_words(bill.free_bytes)} are free, {bytes_in_words(bill.bytes_missing)} too few. "
        f"{largest.asset} takes the most ({bytes_in_words(largest.n_bytes or 0)}): move KD_HOME to a larger disk, "
        f"choose {less}, or plan less (max_tokens); when_space_is_short: warn lets the plan be made all the same"
    )


def bytes_rest_on(line: CacheLine) -> str:
    there = f"; {counted(line.n_there, 'partition')} there, {bytes_in_words(line.bytes_there)}" if line.n_there else ""
    return f"{line.n_tokens:,} tokens; {line.rests_on}{there}"


def flops_in_words(flops: float | None) -> str:
    return "FLOPs not known" if flops is None else f"{flops:.3g} FLOPs"


def _cache_row(line: CacheLine) -> Row:
    return line.asset, "not known" if line.n_bytes is None else bytes_in_words(line.n_bytes), bytes_rest_on(line)


def _tasks_row(line: TasksLine) -> Row:
    words = f"{counted(line.n_tasks, 'task')}, at most {line.concurrency:,} at once"
    words += f", each about {number(line.task_hours)} hours" if line.task_hours is not None else ""
    limit = f"limit {line.limit_hours:,.1f} hours each" if line.limit_hours is not None else "no limit of time"
    return f"{line.kind} job", words, line.warning or limit
