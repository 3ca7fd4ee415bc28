"""What `verify` says: problems, notes and totals, each of a kind that programs can go by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProblemKind = Literal[
    "missing_part",  # a file the manifest lists is not there
    "truncated_part",  # it is shorter than recorded
    "grown_part",  # it is longer
    "changed_part",  # its size is right and its hash is not
    "unreadable_part",  # its hash is right and it is no table
    "wrong_schema",  # it is a table of other columns
    "wrong_documents",  # it has another number of documents than recorded
    "wrong_tokens",  # it has another number of tokens, or they contradict each other
    "wrong_lists",  # a list has not one element for each token, or for each kept position
    "wrong_positions",  # its positions are not those that the cache's parameters say
    "wrong_vocabulary",  # it has ids outside of the student's vocabulary that its cache is cut to
    "wrong_kept",  # its positions keep other numbers of tokens than top_p asks for
    "wrong_draws",  # its random draws are not what the cache's parameters ask for
    "corrupt_index",  # an index of documents that was changed, or is of another commit or of other parts
    "wrong_ids",  # its top-k token ids are repeated, or the teacher has no such ids
    "corrupt_manifest",  # not JSON, changed, or contradicting itself
    "wrong_identity",  # a manifest whose identity lacks what tells the columns
    "misplaced_result",  # a manifest under a folder name of another result
    "corrupt_head",  # a head.json that is none
    "dangling_head",  # a head.json that points to no committed result
    "no_head",  # a partition with committed results, none of which is current: readers see none
    "failed_current",  # the current result is one that failed a check
    "missing_result",  # committed, as the audit log says, and gone
    "not_as_audited",  # its manifest is not the one that was committed
    "corrupt_plan",  # a shard plan that is not the one that was made
    "unreadable",  # the file system does not let us look, or it is of a codec that this version does not know
]
NoteKind = Literal[
    "unfinished",  # no manifest: still being made, or killed
    "interrupted_commit",  # committed, and killed before head, audit line or clean-up
    "foreign_file",  # not of the format, in a folder of the format
    "not_audited",  # committed without a line in the recipe's audit log
    "no_index",  # a large result without an index, which no reuse writes anew
    "failed_check",  # committed, and never current, since it failed a check
    "quarantined",  # put aside, and not made again since
    "not_made",  # partitions of the plan that an asset does not have
    "not_planned",  # partitions of an asset that are not of the plan (any more)
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong with a file."""

    kind: ProblemKind
    path: Path
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something that is not wrong, and worth a line."""

    kind: NoteKind
    path: Path
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at and what was found. Totals are of committed results."""

    path: Path
    n_results: int
    n_parts: int
    n_documents: int
    n_tokens: int
    n_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]

    @property
    def ok(self) -> bool:
        return not self.problems
