"""Every error this project raises on purpose, as one tree.

Anyone may import it. A message says what was expected, what was found, which file, job or shard, and what to do next.
`exit_code` is what the worker and the command line end with when the error reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType


def printable(text: str) -> str:
    """`text` with a Python escape for every control character, bidirectional mark and lone surrogate in it.

    Ids, texts and paths come from files that anybody may have written: in what people read, none of them is to move the
    cursor, to begin a line of its own, or to turn the direction of what is read.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request after flushing; started again, the task goes on where it was."""


class KdAssetsError(Exception):
    """Base of all errors that are an answer to the user rather than a bug of ours."""

    exit_code: int = EXIT_FAILED


class InputError(KdAssetsError):
    """What the user gave is missing, empty or malformed. Nothing was written."""

    exit_code = EXIT_BAD_INPUT


class MissingInputError(InputError):
    """A file, folder, environment variable or model that was named does not exist or is empty."""


class BadRecordError(InputError):
    """A line or row of a source cannot become a document; the message names file, line and reason.

    `kind`: the few words that such records are counted under.
    """

    def __init__(self, message: str, *, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class FieldNotUnderstoodError(InputError):
    """A record has a field that a chat template or a loss would read, and nothing here does.

    Not a bad record that may be skipped: it says of a whole source that what it is made for is not what is made of it.
    """


class RecipeError(InputError):
    """A recipe asks for something that cannot be: an unknown block, k above the vocabulary, no cache at all."""


class ExportFolderError(InputError):
    """A folder that is to hold an export holds another one, or files that are of none; nothing in it is touched."""


class RefusedRequestError(InputError):
    """A request to the replay server that is malformed, too large, or for what no cache can answer.

    `status`: the HTTP status that says so.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class NotInCacheError(RefusedRequestError):
    """A request to the replay server for a sequence or a row that its cache has not."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=404)


class ContractError(KdAssetsError):
    """A job file or event line is missing, not of this version of the contract, or not of its shape."""

    exit_code = EXIT_BAD_INPUT


class StoreError(KdAssetsError):
    """Base of what can be wrong with results on disk."""


class NotCommittedError(StoreError):
    """A folder was read as a result and has no manifest: its job is still running, or was killed."""


class NothingToExportError(NotCommittedError):
    """Of all documents there is none that a format can hold, or there are too few for its reader.

    `left_out`: reason → the documents that are left out for it, as in `export.json`.
    """

    def __init__(self, message: str, *, left_out: Mapping[str, object] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.left_out = left_out


class CorruptManifestError(StoreError):
    """A manifest is not JSON, of another format version, or contradicts itself."""


class CorruptPartError(StoreError):
    """A part file is missing, truncated, or its hash or counts differ from the manifest's."""


class CorruptIndexError(StoreError):
    """The index of a result was changed, or is of another commit. Nothing is lost: its parts say the same."""


class VariantConflictError(StoreError):
    """A reader was pointed at results of several variants and not told which; the message lists them."""


class FailedCheckError(StoreError):
    """A reader was pointed at a result that failed a recorded check, and not told to take it all the same."""


class CorruptPlanError(StoreError):
    """The shard plan beside a recipe's results is not what was planned; what should be there cannot be told."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path
        """The file of the plan that is not what was made."""


class UnknownFieldError(StoreError):
    """A cache was asked for a field it does not hold; the message lists those it does."""


class UnknownCodecError(StoreError):
    """A part or a manifest names a codec that this version does not have; the message says which version reads it."""


class CodecRangeError(StoreError):
    """Numbers that a codec cannot hold; the message names document and row. Nothing of the part was written."""


class NoSourceError(InputError):
    """A result was to be recoded, and nothing is there that it can be made of; the message says what was looked for and
    why what is there will not do."""


class ResultBusyError(StoreError):
    """Another live task holds the lease of this result and is computing it."""


class StorageUnavailableError(StoreError):
    """The file system does not do what it was asked: disk full, no permission, no locks. A rerun continues.

    Nothing follows from it about a result: neither that it is there nor that it is damaged or missing.
    """


class ObstructedError(StoreError):
    """Something that is no file is in a file's place: a folder, a named pipe, a link that leads to itself. No waiting
    mends it, and nothing is written over it."""


class StorageUnreachableError(StorageUnavailableError):
    """The file system gave no true answer, which usually passes: a stale handle, a server that restarts, a mount that
    comes back. What was asked is asked again later."""

    exit_code = EXIT_RESUMABLE


class TeacherError(KdAssetsError):
    """Base of what can be wrong with a teacher."""


class TeacherChangedError(TeacherError):
    """The weights or the tokenizer on disk are not those the job was planned with."""


class NonFiniteTeacherError(TeacherError):
    """The teacher gave NaN or infinity; the message names the document."""


class OutOfDeviceMemoryError(TeacherError):
    """The accelerator's memory did not suffice for a batch. A smaller token budget may."""


class OutOfHostMemoryError(TeacherError):
    """The node's memory did not suffice. More memory for the task may."""


class RankLostError(TeacherError):
    """One of the processes that hold a teacher together ended before its time; the message says which, and how."""


class NodeFaultError(KdAssetsError):
    """The node does not give what the task was given on it, GPUs above all. Another node may."""


class LoaderStateError(KdAssetsError):
    """A training was to go on from a state that is of other documents or another order than its loader, or is none."""


class StudentDidNotLearnError(KdAssetsError):
    """The student's loss was not finite, or did not fall; the message has the numbers."""


class SchedulerError(KdAssetsError):
    """A scheduler refused or lost a job for a reason it states."""


class SchedulerUnreachableError(SchedulerError):
    """The scheduler gave no answer in time. Nothing follows from it: neither that a job lives nor that it is gone."""


class SchedulerMisusedError(SchedulerError):
    """The scheduler's commands do not understand what they are asked: a version that this program does not know, and
    nothing that waiting changes. It says nothing of any job."""


class JobFilesUnavailableError(SchedulerUnreachableError):
    """The files of jobs cannot be read or written now: a full disk, a share that is away. Nothing follows from it
    either, and they are asked for again."""


class DatabaseUnavailableError(KdAssetsError):
    """Dagster's own database gives no answer, or refuses the login. What is committed is kept, and the next run records
    it."""


class NoProgressError(KdAssetsError):
    """A task was started again and again and nothing was added to its results: a loop that ends here."""


class InterruptedTaskError(KdAssetsError):
    """USR1 or TERM arrived; everything finished is on disk and a restart resumes."""

    exit_code = EXIT_RESUMABLE


NO_ANSWER = (OSError, StorageUnavailableError, SchedulerUnreachableError)
"""Neither files nor the scheduler say anything now. Nothing follows from it, and it may be over in a moment."""
