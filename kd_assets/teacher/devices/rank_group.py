"""The other processes of a tensor-parallel teacher: started, told what to run, watched, and ended with this one.

Used by `teacher_on_devices`. The worker is rank 0: it alone has the task's lease, reports, reads shards and writes;
ranks 1 to n - 1 are its children (`follower`), load the same teacher, run what rank 0 tells them by a pipe, and drop
the results. torchrun's program is not used, for it keeps USR1 to itself and ends ranks half a minute after a signal;
its environment (RANK, WORLD_SIZE, ...) and torch's process groups are.

The invariants: every rank runs the same operations in the same order, since a command is sent to all before rank 0 runs
it; a child never outlives its parent (the kernel kills it, see prctl(2) PR_SET_PDEATHSIG); and a rank that ends before
its time ends the task with its reason: either what the main thread does next fails with it, or, when that thread is
stuck in an operation that the lost rank never joins, this module reports the task's end and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_assets.errors import EXIT_FAILED, KdAssetsError, RankLostError
from kd_assets.teacher.devices.lost_rank import LostRank, as_our_error, is_only_a_lost_connection, lost_rank

if TYPE_CHECKING:
    import torch

STUCK_S = 10.0
"""How long after a rank was lost this process may take to end its task by itself."""
REASON_WAIT_S = 3.0
"""How long an operation that failed waits for the news that a rank is gone: a broken connection may come first."""
CLOSE_WAIT_S = 20.0
"""How long ranks may take to end when asked to."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Of one operation among ranks. Lost ranks are noticed at once; this is for what is neither lost nor goes on, and the
first operation waits for the rank whose disk is slowest in reading the weights."""
LAST_LINES = 12
"""Of a lost rank's stderr in the error."""

SIGNALS_OF_RANK_0 = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Other ranks take no notice of them."""

RankCommand = tuple[Any, ...]


@dataclass(kw_only=True, slots=True, eq=False)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))


class RankGroup:
    """Ranks 1 to n - 1, seen from rank 0. Make it, then join torch's group of all ranks (`join_group`), then load."""

    def __init__(
        self,
        n_ranks: int,
        load_command: RankCommand,
        *,
        report_fatal: Callable[[Exception], None],
        program: Sequence[str] = (sys.executable, "-m", "kd_assets.teacher.devices.follower"),
    ) -> None:
        """Start them, each with the pickled `load_command`. Main thread only: children die with the thread that made
        them. `report_fatal`: see `kd_assets.contract.events.Reporter`."""
        self.n_ranks = n_ranks
        self._report_fatal = report_fatal
        self._lost_ranks: list[LostRank] = []
        self._noting = threading.Lock()
        self._lost, self._closing = threading.Event(), threading.Event()
        self._failure: KdAssetsError | None = None
        """Why nothing can be run any more."""
        self._environment_before = {name: os.environ.get(name) for name in rank_environment(0, n_ranks)}
        os.environ.update(rank_environment(0, n_ranks))  # for transformers
        self._folder = tempfile.TemporaryDirectory(prefix="kd-assets-ranks-")
        self.store_file = Path(self._folder.name) / "store"
        self._children: list[_Child] = []
        try:
            for rank in range(1, n_ranks):
                self._children.append(self._start(rank, program))
            self._send_to_all(load_command)
        except OSError as e:
            # A pipe breaks where a rank has ended already.
            reason = self._reason() if self._children and self._lost.wait(REASON_WAIT_S) else None
            self.close()
            raise reason or RankLostError(f"the {n_ranks} processes of the teacher could not be started: {e}") from e

    def _start(self, rank: int, program: Sequence[str]) -> _Child:
        ours, theirs = Pipe()
        # What comes before a child has begun to ignore signals waits, so that it is not ended by one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_RANK_0)
        try:
            process = subprocess.Popen(
                [*program, "--parent", str(os.getpid()), "--pipe", str(theirs.fileno()), str(self.store_file)],
                env={**os.environ, **rank_environment(rank, self.n_ranks)},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        child = _Child(rank=rank, process=process, connection=ours)
        relay = threading.Thread(target=_relay, args=(child,), name=f"rank-{rank}-stderr", daemon=True)
        relay.start()
        threading.Thread(target=self._watch, args=(child, relay), name=f"rank-{rank}", daemon=True).start()
        return child

    # ------------------------------------------------------------------ running

    @contextlib.contextmanager
    def together(self, command: RankCommand | None) -> Iterator[None]:
        """Every rank runs `command` (None: what it was started with); the body is rank 0's part.

        An error in the body is an end: the ranks are no longer where rank 0 is. Where it came from another rank's end,
        that one's reason is raised in its place.
        """
        self.raise_if_lost()
        try:
            if command is not None:
                self._send_to_all(command)
            yield
        except Exception as e:
            self._fail(e)
            raise

    @property
    def is_broken(self) -> bool:
        """Whether the ranks can run nothing more together."""
        return self._lost.is_set() or self._failure is not None

    def raise_if_lost(self) -> None:
        """Raise the reason why no rank runs anything any more, if so."""
        if self._failure is None and self._lost.is_set():
            self._failure = self._reason()
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _send_to_all(self, command: RankCommand) -> None:
        message = pickle.dumps(command, protocol=pickle.HIGHEST_PROTOCOL)
        for child in self._children:
            child.connection.send_bytes(message)

    def _fail(self, e: Exception) -> None:
        """Rank 0 ran into `e`, perhaps because of another rank. Raises that one's reason then; else returns."""
        own = as_our_error(e)
        if own is None or is_only_a_lost_connection(str(e)):
            self._lost.wait(REASON_WAIT_S)
            if self._lost.is_set():
                self._failure = self._reason()
                raise self._failure from e
        self._failure = own or RankLostError(f"rank 0 of {self.n_ranks} failed before: {type(e).__name__}: {e}")

    def _reason(self) -> KdAssetsError:
        """Of the ranks that were lost the one that began it, as far as can be told."""
        time.sleep(0.2)  # the others, which lose their connections, are seen at about the same time
        lost_ranks = list(self._lost_ranks)
        return next((lost for lost in lost_ranks if lost.is_cause), lost_ranks[0]).error

    # ------------------------------------------------------------------ watching

    def _watch(self, child: _Child, relay: threading.Thread) -> None:
        status = child.process.wait()
        relay.join(timeout=1.0)
        if self._closing.is_set():
            return
        lost = lost_rank(child.rank, self.n_ranks, status, _final_error(child), list(child.last_lines))
        with self._noting:
            is_first = not self._lost_ranks
            self._lost_ranks.append(lost)
        self._lost.set()
        if is_first and not self._closing.wait(STUCK_S):
            reason = self._reason()
            self._report_fatal(reason)
            print(f"ended, since the main thread waits for a rank that is gone: {reason}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(EXIT_FAILED)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """End them, and their group; returns once they are gone. Main thread only."""
        if self._closing.is_set():
            return
        self._closing.set()
        if not self.is_broken:  # else it would wait for ranks that are gone
            with contextlib.suppress(OSError):
                self._send_to_all(("close",))
            # Only now: NCCL ends a group when all ranks of a node end it (ncclCommDestroy).
            leave_group()
        deadline = time.monotonic() + (0.0 if self.is_broken else CLOSE_WAIT_S)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            child.process.kill()
            child.process.wait()
            child.connection.close()
        self._folder.cleanup()
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self.is_broken and _uses_cuda():
            # Kernels that wait for a lost rank never end, and the end of this process would wait for them.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(round(STUCK_S))


def rank_environment(rank: int, n_ranks: int) -> dict[str, str]:
    """What torchrun would set, as far as one node and a store of our own need it."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
    }
    # All ranks are on this node: no name of it needs to be resolved, and no other interface has to be up.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name not in os.environ:
            environment[name] = "lo"
    return environment


def _final_error(child: _Child) -> tuple[str, str] | None:
    with contextlib.suppress(EOFError, OSError):
        while child.connection.poll():
            name, message = pickle.loads(child.connection.recv_bytes())  # noqa: S301 - a pipe of our own child
            return str(name), str(message)
    return None


def _relay(child: _Child) -> None:
    """Pass on what a rank writes to stderr, line by line, with its name."""
    assert child.process.stderr is not None
    with child.process.stderr as lines:
        for raw in lines:
            line = raw.decode("utf-8", "replace").rstrip()
            child.last_lines.append(line)
            with contextlib.suppress(OSError):
                print(f"rank {child.rank}: {line}", file=sys.stderr, flush=True)


def _uses_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


# ----------------------------------------------------------------------------------------------------- the group


def join_group(rank: int, n_ranks: int, store_file: Path) -> torch.device:
    """Join torch's process group of all ranks; returns the device of this one.

    They meet by a file that only this user can reach: there is no port to race for, or for others to talk to.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(store_file), n_ranks),  # type: ignore[attr-defined]
        rank=rank,
        world_size=n_ranks,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
