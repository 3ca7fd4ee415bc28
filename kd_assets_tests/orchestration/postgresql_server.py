"""A real PostgreSQL server in a temporary folder, which can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

from kd_assets_tests.ports import reserve_ports

USER = "postgres"
"""Of the machine, where this is root, which the server refuses to be; and of the database."""


def server_programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: on PATH, or where Debian puts them; None where there is no server."""
    if (found := shutil.which("pg_ctl")) is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


class PostgresqlServer:
    """Listens on a port of this machine alone; anybody here may connect. As durable as in production: it syncs."""

    def __init__(self) -> None:
        programs = server_programs()
        assert programs is not None, "there is no PostgreSQL server here: run .ci/install-postgresql"
        self._programs = programs
        # Not in a test's folder, which only root may enter where this is root.
        self._folder = Path(tempfile.mkdtemp(prefix="kd-assets-postgresql-"))
        self._data = self._folder / "data"
        if os.getuid() == 0:
            shutil.chown(self._folder, USER)
        self._reserved = contextlib.ExitStack()
        (self._port,) = reserve_ports(1, until=self._reserved)
        self._run("initdb", "--auth=trust", f"--username={USER}", "--encoding=UTF8", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self._port}/{USER}"

    def new_database(self) -> str:
        """The address of an empty one."""
        name = f"test_{secrets.token_hex(4)}"
        words = ["--host=127.0.0.1", f"--port={self._port}", f"--username={USER}", name]
        subprocess.run([self._programs / "createdb", *words], check=True)
        return f"{self.url.rpartition('/')[0]}/{name}"

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "start", "--wait", "--timeout=300", f"--log={self._folder / 'log'}", f"--options={options}")

    def kill(self) -> None:
        """kill -9 of the server and of all that it has started, which otherwise go a moment later: no other can be
        started on its files as long as one of them is there."""
        server = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=60)

    def close(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate", "--silent", check=False)
        self._reserved.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> PostgresqlServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, program: str, *words: str, check: bool = True) -> None:
        command = [str(self._programs / program), "--pgdata", str(self._data), *words]
        user = USER if os.getuid() == 0 else None
        done = subprocess.run(command, user=user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert not check or done.returncode == 0, done.stderr


def storage_on(url: str) -> dict[str, Any]:
    """`storage` of a dagster.yaml, on the database at this address."""
    return {
        "custom": {
            "module": "kd_assets.dagster_storage.postgresql",
            "class": "PostgresqlStorage",
            "config": {"postgres_url": url},
        }
    }
