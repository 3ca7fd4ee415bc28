"""Why a partition has no result yet, and what is done about it. Pure: what happened in, what to do out.

The task's own report comes first, the scheduler's word second. What another start can heal is tried again, with what
the failure asks for (other nodes, more memory, smaller batches), at most MAX_ATTEMPTS times without a new part on disk;
a task that was stopped and had got on costs no attempt. An error in the work itself is the user's to mend.

A fault that one node alone is likely to have (a missing mount, a broken GPU) is counted by node. A node with
MAX_FAULTS_OF_A_NODE of them is left out from then on, and what meets such faults on MAX_FAULTY_NODES nodes is given up:
that many nodes are not broken at once, so it is the work or the site.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Hashable
from dataclasses import dataclass

from kd_assets.errors import EXIT_RESUMABLE
from kd_assets.scheduler import Ending, Resources, TaskState

MAX_ATTEMPTS = 3
"""Of a partition, one after the other without progress."""
MAX_FAULTS_OF_A_NODE = 2
"""Each of another task; then the node is left out."""
MAX_FAULTY_NODES = 3
"""On which a partition met faults, before they are taken for its own."""
MEMORY_FACTOR = 2.0
DEFAULT_MEMORY_LIMIT = 4.0
"""Times the memory first asked for, where `max_memory_gib` does not say."""
SMALLEST_TOKEN_BUDGET = 256
UNTOLD_TOKEN_BUDGET = 8192
"""What a task is taken to have had that was to find its token budget itself and did not say what it found."""
SIGKILL_STATUS = 128 + 9
NODE_FAULT_STATUSES = {
    126: "a program that this node cannot run",
    127: "a program that is not on this node: is a mount missing?",
    128 + 4: "SIGILL: a processor that does not know an instruction",
    128 + 7: "SIGBUS: memory or a mapped file that could not be read",
}
"""Exit statuses of a task's script that other nodes may not have."""
_NODE_FAULT_TEXTS = re.compile(
    r"uncorrectable ECC error|ECC error encountered|"
    r"no CUDA-capable device|CUDA-capable device\(s\) is/are busy or unavailable|No CUDA GPUs are available|"
    r"Found no NVIDIA driver|NVIDIA driver on your system is too old|CUDA driver (version|initialization|error)|"
    r"unsupported display driver / cuda driver combination|CUDA (error: )?(unknown error|initialization error|"
    r"system not yet initialized|invalid device ordinal|hardware stack error)|NVLink (was|error)|"
    r"NVML|Driver/library version mismatch|GPU is lost|fallen off the bus|No devices? (were )?found|"
    r"cannot open shared object file",
    re.IGNORECASE,
)
"""In what a task reports of a library's error: the driver, the device or an installation of its node."""


class FailureClass(enum.Enum):
    """What kept a task from its results."""

    INTERRUPTED = "stopped on request"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    NODE_FAILURE = "node failure"
    """The scheduler says so."""
    NODE_FAULT = "node fault"
    """What the task met looks like one of its node."""
    HOST_MEMORY = "out of host memory"
    DEVICE_MEMORY = "out of device memory"
    KILLED = "killed"
    STORAGE = "storage unreachable"
    LAUNCH_FAILURE = "launch failure"
    LOST = "lost by the scheduler"
    NO_RESULT = "ended without its results"
    HELD = "held after failed launches"
    IMPOSSIBLE = "impossible request"
    CANCELLED = "cancelled"
    WORK = "error in the work"


FREE = frozenset({FailureClass.INTERRUPTED, FailureClass.TIME_LIMIT, FailureClass.PREEMPTED, FailureClass.STORAGE})
"""Nobody's fault: they cost an attempt only without progress."""
BLAMES_THE_NODE = frozenset({FailureClass.NODE_FAULT, FailureClass.LAUNCH_FAILURE})
"""Counted by node (see `NodeFaults`). A node that failed as a whole SLURM knows; storage may be away everywhere."""
BOUNDED_BY_ITSELF = frozenset({FailureClass.HOST_MEMORY, FailureClass.DEVICE_MEMORY})
"""Each retry asks for something else, up to a limit."""
FINAL = frozenset({FailureClass.HELD, FailureClass.IMPOSSIBLE, FailureClass.CANCELLED, FailureClass.WORK})
"""Another start would end the same way, or somebody does not want one."""

_BY_ENDING = {
    Ending.KILLED: FailureClass.KILLED,
    Ending.TIME_LIMIT: FailureClass.TIME_LIMIT,
    Ending.PREEMPTED: FailureClass.PREEMPTED,
    Ending.NODE_FAILURE: FailureClass.NODE_FAILURE,
    Ending.HOST_MEMORY: FailureClass.HOST_MEMORY,
    Ending.LAUNCH_FAILURE: FailureClass.LAUNCH_FAILURE,
    Ending.HELD: FailureClass.HELD,
    Ending.IMPOSSIBLE: FailureClass.IMPOSSIBLE,
    Ending.CANCELLED: FailureClass.CANCELLED,
    Ending.LOST: FailureClass.LOST,
}
_BY_ERROR = {
    "OutOfDeviceMemoryError": FailureClass.DEVICE_MEMORY,
    "OutOfHostMemoryError": FailureClass.HOST_MEMORY,
    "InterruptedTaskError": FailureClass.INTERRUPTED,
    "RankLostError": FailureClass.KILLED,
    "StorageUnreachableError": FailureClass.STORAGE,
    "NodeFaultError": FailureClass.NODE_FAULT,
}
_LIBRARY_ERRORS = frozenset(
    {"AcceleratorError", "DeferredCudaCallError", "DistBackendError", "ImportError", "OSError", "RankLostError",
     "RuntimeError", "TeacherError"}
)  # fmt: skip
"""Names of errors whose text may be a driver's; NVML's begin with NVMLError. Of others the text may be a user's."""

_BY_STATUS = {
    0: FailureClass.NO_RESULT,
    None: FailureClass.NO_RESULT,
    EXIT_RESUMABLE: FailureClass.INTERRUPTED,
    SIGKILL_STATUS: FailureClass.KILLED,
}
"""Of a script that ended by itself; None is a status that the scheduler never learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionError:
    """What a task reported of a partition it could not make."""

    name: str
    """Of the exception's class."""
    message: str
    while_loading: bool = False
    """Before the first partition's turn: then it is the same for all of them."""


def classify(
    state: TaskState,
    last_word: str | None,
    error: PartitionError | None,
    *,
    said_anything: bool = True,
    has_begun: bool = True,
) -> FailureClass:
    """The class of a partition that a task left without a result.

    `error` is what the task reported for it, `last_word` the status with which the task said it finished; None where it
    said nothing. `said_anything`: it wrote an event or a line to its log. `has_begun`: it wrote an event.
    """
    if error is not None:
        return _class_of_error(state, error)
    if state.ending is None or last_word == "done":
        return FailureClass.NO_RESULT
    if state.ending in (Ending.EXITED, Ending.KILLED):
        return _class_of_status(state, said_anything=said_anything, has_begun=has_begun)
    return _BY_ENDING[state.ending]


def _class_of_error(state: TaskState, error: PartitionError) -> FailureClass:
    has_driver_text = error.name in _LIBRARY_ERRORS or error.name.startswith("NVMLError")
    if has_driver_text and _NODE_FAULT_TEXTS.search(f"{error.name}: {error.message}"):
        return FailureClass.NODE_FAULT
    failure = _BY_ERROR.get(error.name, FailureClass.WORK)
    if failure is FailureClass.KILLED and state.ending is Ending.HOST_MEMORY:
        return FailureClass.HOST_MEMORY  # what killed one of its processes
    # Weights that do not fit the device are none the smaller for smaller batches.
    return FailureClass.WORK if error.while_loading and failure is FailureClass.DEVICE_MEMORY else failure


def _class_of_status(state: TaskState, *, said_anything: bool, has_begun: bool) -> FailureClass:
    """Of a script that ended, by itself or by a signal, and said nothing of this partition."""
    status = state.exit_code
    if status is not None and status < 0:
        status = 128 - status
    if status in NODE_FAULT_STATUSES:
        return FailureClass.NODE_FAULT
    if not has_begun and status not in (0, None, EXIT_RESUMABLE):
        # A node that could not start the script ends it with some status, and without a word of ours.
        return FailureClass.NODE_FAULT if said_anything else FailureClass.LAUNCH_FAILURE
    if state.ending is Ending.KILLED:
        return FailureClass.KILLED
    return _BY_STATUS.get(status, FailureClass.WORK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the job of a failed partition had asked for."""

    resources: Resources
    excluded_nodes: frozenset[str] = frozenset()
    token_budget: int | None = None
    """Tokens of a batch; None where tasks find them by themselves, or the kind has no batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """What one partition has been through."""

    n_without_progress: int = 0
    n_parts: int = 0
    """Parts that the tasks it was in had put on disk when it failed last."""
    faulty_nodes: tuple[str, ...] = ()
    """Where it met faults of nodes since the last progress, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """Start it again, asking for this."""

    asked: Asked
    attempts: Attempts


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    why: str
    """In words that follow the cause; empty where the cause says it all."""


class NodeFaults:
    """How often each node was at fault, as one run has seen it."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[Hashable]] = {}
        self._last_words: dict[str, str] = {}

    def note(self, node: str, task: Hashable, words: str) -> None:
        """A task met a fault on a node; however many of its partitions did, it is one."""
        self._tasks.setdefault(node, set()).add(task)
        self._last_words[node] = words

    @property
    def sick_nodes(self) -> frozenset[str]:
        """Those that are left out."""
        return frozenset(node for node, tasks in self._tasks.items() if len(tasks) >= MAX_FAULTS_OF_A_NODE)

    def in_words(self, nodes: frozenset[str] | None = None) -> str:
        """`n3 (2 faults; the last: …), n7 (…)`, of these nodes or of all; empty where none was at fault."""
        return ", ".join(
            f"{node} ({len(tasks)} fault{'s' * (len(tasks) > 1)}; the last: {self._last_words[node]})"
            for node, tasks in sorted(self._tasks.items())
            if nodes is None or node in nodes
        )


def decide(
    failure: FailureClass,
    asked: Asked,
    attempts: Attempts,
    *,
    n_parts: int,
    node: str,
    token_budget: int | None = None,
) -> Retry | GiveUp:
    """What to do about a partition that failed on `node` (empty: unknown).

    `n_parts`: parts that the tasks it was in have put on disk so far. `token_budget`: what its task said it had last,
    which it may have found itself or made smaller; None: it did not say. Which nodes are left out for their faults is
    not decided here: see `NodeFaults`.
    """
    if failure in FINAL:
        return GiveUp(why="")
    progressed = n_parts > attempts.n_parts
    n_before = 0 if progressed else attempts.n_without_progress
    faulty_nodes = () if progressed else attempts.faulty_nodes
    if failure is FailureClass.NODE_FAULT and node:
        faulty_nodes = (*faulty_nodes, node)
        if why := _is_no_fault_of_nodes(faulty_nodes):
            return GiveUp(why=why)
    is_bounded = failure in BOUNDED_BY_ITSELF or (failure is FailureClass.NODE_FAULT and node != "")
    is_free = is_bounded or (progressed and failure in FREE)
    n_now = n_before if is_free else n_before + 1
    if n_now >= MAX_ATTEMPTS:
        return GiveUp(why=f"given up after {n_now} attempts in a row without a new part on disk")
    adjusted = _adjusted(failure, asked, node, token_budget)
    if isinstance(adjusted, GiveUp):
        return adjusted
    made = Attempts(n_without_progress=n_now, n_parts=n_parts, faulty_nodes=faulty_nodes)
    return Retry(asked=adjusted, attempts=made)


def _is_no_fault_of_nodes(faulty_nodes: tuple[str, ...]) -> str:
    """Why what was taken for faults of nodes is none; empty while it may be one."""
    nodes = sorted(set(faulty_nodes))
    if len(nodes) >= MAX_FAULTY_NODES:
        return (
            f"given up, since it failed so on {len(nodes)} nodes ({', '.join(nodes)}): that is no fault of one node "
            "but of the work or of the site's installation. See the log, mend it, and materialize again"
        )
    if faulty_nodes.count(faulty_nodes[-1]) > MAX_FAULTS_OF_A_NODE:
        return (
            f"given up, since it failed so {faulty_nodes.count(faulty_nodes[-1])} times on {faulty_nodes[-1]} and was "
            "given no other node. See the log, mend it, and materialize again"
        )
    return ""


def _adjusted(failure: FailureClass, asked: Asked, node: str, token_budget: int | None) -> Asked | GiveUp:
    match failure:
        # A mount is often stale on one node alone, and the task has waited for it already.
        case FailureClass.NODE_FAILURE | FailureClass.LAUNCH_FAILURE | FailureClass.STORAGE if node:
            return dataclasses.replace(asked, excluded_nodes=asked.excluded_nodes | {node})
        case FailureClass.HOST_MEMORY:
            return _with_more_memory(asked)
        case FailureClass.DEVICE_MEMORY:
            return _with_smaller_batches(asked, token_budget or asked.token_budget or UNTOLD_TOKEN_BUDGET)
        case _:
            return asked


def _with_more_memory(asked: Asked) -> Asked | GiveUp:
    resources = asked.resources
    if resources.memory_gib is None:
        return GiveUp(why="the job asked for no certain memory, so none can be added: set memory_gib for this kind")
    limit = resources.max_memory_gib or resources.memory_gib * DEFAULT_MEMORY_LIMIT
    more = min(resources.memory_gib * MEMORY_FACTOR, limit)
    if more <= resources.memory_gib:
        return GiveUp(why=f"it had the most memory that max_memory_gib allows, {resources.memory_gib:g} GiB")
    # The limit is kept, so that the next failure does not multiply from where this one ended.
    return dataclasses.replace(asked, resources=dataclasses.replace(resources, memory_gib=more, max_memory_gib=limit))


def _with_smaller_batches(asked: Asked, token_budget: int) -> Asked | GiveUp:
    """Half of the `token_budget` that was too large."""
    if token_budget // 2 < SMALLEST_TOKEN_BUDGET:
        return GiveUp(why=f"batches of {token_budget} tokens cannot be made smaller: use a larger device")
    return dataclasses.replace(asked, token_budget=token_budget // 2)
