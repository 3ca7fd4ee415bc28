"""Whether a process sees the GPUs that its task was given. A teacher on the CPU of a GPU node is no success: a driver
that does not load, a device that fell off the bus or a cgroup that hides it shows nowhere else.

Used by `task` before a kind that runs a model is loaded. torch is imported by nobody who is given none.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from kd_assets.errors import NodeFaultError

GPUS_ASKED = "KD_GPUS_PER_NODE"
"""How many the job asked for; set in the environment file of its submission."""
_LISTS = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS")
_NUMBERS = ("SLURM_GPUS_ON_NODE", GPUS_ASKED)


def given_gpus(environment: Mapping[str, str], *, n_processes: int = 1) -> tuple[int, str]:
    """How many GPUs this process must see, at least, and which variable says so; 0 where none was given.

    With several processes on the node each has its share, which CUDA_VISIBLE_DEVICES is cut down to (see
    `worker.main.share_node`), or shares one. CUDA shows a process one MIG instance at most.
    """
    visible = _listed(environment.get("CUDA_VISIBLE_DEVICES", ""))
    said = {name: len(_listed(environment.get(name, ""))) for name in _LISTS}
    said |= {name: int(text) for name in _NUMBERS if (text := environment.get(name, "")).isdecimal()}
    if not any(said.values()):
        return 0, ""
    of_node = {name: n for name, n in said.items() if name != "CUDA_VISIBLE_DEVICES"}
    n_by_share = max(1, max(of_node.values(), default=0) // n_processes) if any(of_node.values()) else 0
    n_given = max(n_by_share, len(visible))
    who = "CUDA_VISIBLE_DEVICES" if len(visible) >= n_by_share else max(of_node, key=lambda name: of_node[name])
    if any(gpu.upper().startswith("MIG") for gpu in visible):
        n_given = 1
    return n_given, f"{who}={environment[who]}"


def require_given_gpus(environment: Mapping[str, str], *, n_processes: int = 1) -> None:
    """Raises NodeFaultError where torch sees fewer GPUs than the process was given."""
    n_given, says = given_gpus(environment, n_processes=n_processes)
    if n_given == 0:
        return
    import torch

    n_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_seen >= n_given:
        return
    built_for = torch.version.cuda or torch.version.hip or "no GPU: its build is for CPUs only"
    raise NodeFaultError(
        f"this process was given {n_given} GPUs on {socket.gethostname()} ({says}) and torch {torch.__version__} sees "
        f"{n_seen}, so nothing is computed on the CPU instead. Look there with nvidia-smi for driver and devices "
        f"(this torch is built for {built_for}); a job that is to run on CPUs asks for no GPUs, and its "
        "CUDA_VISIBLE_DEVICES is not set"
    )


def _listed(text: str) -> list[str]:
    """Devices as CUDA reads them: those after an invalid one do not count."""
    found: list[str] = []
    for word in (part.strip() for part in text.split(",")):
        if word in ("", "-1", "NoDevFiles", "none", "void"):
            break
        found.append(word)
    return found
