"""Ranks 1 to n - 1 of a tensor-parallel teacher: `python -m kd_assets.teacher.devices.follower`.

A follower loads the same teacher as rank 0, runs what it is told by a pipe, and drops the results. It talks
to rank 0 alone: it ignores signals, reports nothing, and ends with rank 0 however that ends. Nothing heavy is imported
before that is so.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kd_assets.errors import EXIT_FAILED

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("store_file", type=Path)
    arguments = parser.parse_args(argv[1:])
    end_with_parent(arguments.parent)
    ignore_signals()
    connection = Connection(arguments.pipe)
    try:
        follow(connection, arguments.store_file)
    except EOFError:  # rank 0 is gone
        return EXIT_FAILED
    except BaseException as e:  # noqa: BLE001 - whatever it is, rank 0 has to know of it
        traceback.print_exc()
        connection.send_bytes(pickle.dumps(final_error(e)))
        return EXIT_FAILED
    return 0


def end_with_parent(parent: int) -> None:
    """Be killed by the kernel when the process `parent` is gone; at once if it is already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_FAILED)


def ignore_signals() -> None:
    """What is for rank 0 to answer; what came since this process was started is dropped."""
    from kd_assets.teacher.devices.rank_group import SIGNALS_OF_RANK_0

    for number in SIGNALS_OF_RANK_0:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_OF_RANK_0)


def follow(connection: Connection, store_file: Path) -> None:
    """Load what rank 0 loads, then run its commands until it says `close`."""
    from transformers.utils import logging

    from kd_assets.teacher.devices.rank_group import join_group, leave_group
    from kd_assets.teacher.devices.teacher_on_devices import load_rank

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # rank 0 says the same
    device = join_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), store_file)
    held = load_rank(*_received(connection), device=device)
    while (command := _received(connection))[0] != "close":
        held.run(command)
    leave_group()


def final_error(e: BaseException) -> tuple[str, str]:
    """Class and text of what this rank ends with."""
    from kd_assets.teacher.devices.lost_rank import as_our_error

    e = as_our_error(e) or e
    return type(e).__name__, str(e) or type(e).__name__


def _received(connection: Connection) -> tuple[Any, ...]:
    command: tuple[Any, ...] = pickle.loads(connection.recv_bytes())  # noqa: S301 - a pipe of our own parent
    return command


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's end: it may wait for other ranks that are gone.
    os._exit(code)
