"""Where a task runs and with what: facts for manifests. Standard library only, and no secrets.

The environment is read by name, never copied: tokens live in it.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from typing import Any

import kd_assets

_LIBRARIES = ("numpy", "pyarrow", "torch", "transformers", "tokenizers", "safetensors", "accelerate")


def task_provenance(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Host, user, versions of Python and libraries, and the SLURM job this process is a task of (None outside)."""
    array_job_id = environment.get("SLURM_ARRAY_JOB_ID")
    return {
        "host": socket.gethostname(),
        "user": _user(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "kd_assets": kd_assets.__version__,
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "slurm_job_id": environment.get("SLURM_JOB_ID"),
        "slurm_array_job_id": array_job_id,
        "slurm_array_task_id": environment.get("SLURM_ARRAY_TASK_ID"),
        "slurm_partition": environment.get("SLURM_JOB_PARTITION"),
        "slurm_nodelist": environment.get("SLURM_JOB_NODELIST"),
        "attempt": int(environment.get("SLURM_RESTART_COUNT") or 0),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user id that has no name
        return str(os.getuid())
