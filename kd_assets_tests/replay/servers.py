"""`kd-assets serve` in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_assets_tests.patience import PATIENCE_S

TOKEN = "a secret of the tests".replace(" ", "-")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server that takes requests."""

    url: str
    process: subprocess.Popen[str]
    said: str
    """Its first line."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def children(self) -> list[int]:
        """Process ids of those that answer."""
        return [
            int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _parent_of(stat) == self.process.pid
        ]

    def metrics(self, **how: object) -> dict[str, float]:
        import requests  # not everywhere where tests are collected

        text = requests.get(f"{self.url}/metrics", timeout=PATIENCE_S, **how).text  # type: ignore[arg-type]
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


def _parent_of(stat: Path) -> int | None:
    """proc(5): the fields after the name, which may have anything in it, are state and parent."""
    with contextlib.suppress(OSError):  # it has just ended
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return None


def sockets_of(process_id: int) -> set[str]:
    """Names of the sockets that a process has open, such as `socket:[4711]`."""
    found = set()
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        with contextlib.suppress(OSError):  # it has just been closed
            found.add(os.readlink(descriptor))
    return {name for name in found if name.startswith("socket:")}


def listening_socket(port: int) -> str:
    """The name of the socket that listens on an IPv4 port. proc_net_tcp(5): state 0A listens, field 9 is the inode."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = [f[9] for f in lines if f[3] == "0A" and int(f[1].rpartition(":")[2], 16) == port]
    assert len(inodes) == 1
    return f"socket:[{inodes[0]}]"


def command(recipe_folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "kd_assets.cli", "serve", str(recipe_folder), *arguments]


_SLOW = """
import sys, time
from pathlib import Path
from kd_assets.replay.answering import Answer, Desk
from kd_assets.replay.requests import Limits
from kd_assets.replay.serving import ServeOptions, serve
def slow(self, route, body, now, answer_id):
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    return Answer(status=200, body=b"1" * int(sys.argv[3]))
Desk.answer = slow
options = ServeOptions(recipe_folder=Path(sys.argv[1]), port=0, processes=2, limits=Limits(shutdown_s=1))
serve(options, token=None, say=lambda line: print(line, flush=True))
"""


def slow_command(recipe_folder: Path, *, gate: Path, answer_bytes: int = 2) -> list[str]:
    """A server that has no answer before this file is there, whose answers are so large, and that has one second to
    end."""
    return [sys.executable, "-c", _SLOW, str(recipe_folder), str(gate), str(answer_bytes)]


@contextlib.contextmanager
def served(
    recipe_folder: Path,
    *arguments: str,
    token: str | None = None,
    log: Path | None = None,
    started_by: Sequence[str] = (),
) -> Iterator[Server]:
    """A server of this recipe on a free port; ended by SIGTERM if it is still there. `log`: for its stderr.

    `started_by`: another command line than the user's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "KD_SERVE_TOKEN"}
    if token is not None:
        environment["KD_SERVE_TOKEN"] = token
    with open(log or os.devnull, "w") as errors:
        process = subprocess.Popen(
            started_by or command(recipe_folder, "--port", "0", *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        with process:
            try:
                assert process.stdout is not None
                said = process.stdout.readline()
                assert said, "the server ended"
                yield Server(url=said.split(": ")[0], process=process, said=said)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(timeout=PATIENCE_S)


def gone(process_ids: list[int], within_s: float = PATIENCE_S) -> bool:
    """Whether all of these processes end within a time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(Path(f"/proc/{process_id}").exists() for process_id in process_ids):
            return True
        time.sleep(0.1)
    return False
