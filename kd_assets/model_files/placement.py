"""How a teacher lies on the GPUs of a node: on one each, split by tensor parallelism, or layer by layer.

Anyone may import it. The control plane asks before it submits, with what the cluster's profile says of the GPUs, since
the answer decides how many processes share a task; a process on the node asks again, with the GPUs that it sees. The
invariant: the same facts give the same answer on either side, and every answer has its reason.

The order of preference is by speed: a GPU that holds the whole teacher waits for no other, so as many
processes as GPUs each take their share of the partitions; else as few GPUs as hold it, by tensor parallelism, where all
of them work on each batch; else, for what has no plan for that, layers laid over GPUs, of which one works at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kd_assets.errors import RecipeError
from kd_assets.model_files.size import TeacherSize

Kind = Literal["one_device", "tensor_parallel", "device_map"]

PlacementChoice = Literal["auto", "one_device", "tensor_parallel", "device_map"]

ROOM_GIB = 6.0
"""Of each GPU, for what is not weights: CUDA's own, a batch's activations, a chunk of logits. 8,192 tokens through a
block of 70B need about 2 GiB, and 2 GiB go to the rest; more room makes larger batches, which gain little."""

ROOM_SHARE = 0.15
"""At most this share of a GPU: a small one runs a small teacher."""

_WORDS: Mapping[Kind, str] = {
    "one_device": "on one device",
    "tensor_parallel": "tensor parallel over",
    "device_map": "layer by layer over",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How one process holds the teacher, and how many such processes a node has room for."""

    kind: Kind
    n_devices: int
    """Of one process."""
    n_processes: int
    reason: str

    @property
    def where(self) -> str:
        return _WORDS[self.kind] + ("" if self.kind == "one_device" else f" {self.n_devices}")

    @property
    def in_words(self) -> str:
        """One line for people."""
        return f"{self.reason}: {self.where}, {self.n_processes} process{'es' * (self.n_processes > 1)} a task"


ONE_DEVICE = Placement(kind="one_device", n_devices=1, n_processes=1, reason="there is one device")


def room_gib(gpu_memory_gib: float) -> float:
    """What of a GPU is kept free of weights."""
    return min(ROOM_GIB, ROOM_SHARE * gpu_memory_gib)


def place(
    size: TeacherSize,
    *,
    n_gpus: int,
    gpu_memory_gib: float | None,
    wanted: PlacementChoice = "auto",
    n_devices: int | None = None,
    n_processes: int | None = None,
) -> Placement | None:
    """How a teacher lies on a node of `n_gpus` GPUs, each of `gpu_memory_gib`; 0 GPUs: on the CPU.

    `wanted`, `n_devices`: what the recipe says. `n_processes`: how many processes share the GPUs, where that is
    settled; None: as many as the answer leaves room for. Returns None where the answer depends on the memory, which is
    not known. Raises RecipeError for what cannot be.
    """
    if n_gpus == 0:
        return _on_cpu(size, wanted, n_devices)
    share = n_gpus if n_processes is None else max(1, n_gpus // n_processes)
    if n_devices is not None and n_devices > share:
        raise RecipeError(
            f"teacher.n_devices is {n_devices}, and a process has {share} GPUs ({n_gpus} on the node): ask for more "
            "gpus_per_node, or fewer processes_per_task"
        )
    chosen = _choose(size, share, gpu_memory_gib, wanted, n_devices)
    if chosen is None:
        return None
    kind, n, why = chosen
    processes = n_processes or max(1, n_gpus // n)
    return Placement(kind=kind, n_devices=n, n_processes=processes, reason=f"{size.in_words}{why}")


def _on_cpu(size: TeacherSize, wanted: PlacementChoice, n_devices: int | None) -> Placement:
    """Without GPUs a teacher is split only where the recipe asks for tensor parallelism: that is for tests."""
    n = (n_devices or 2) if wanted == "tensor_parallel" else 1
    if n > 1:
        _check_split(size, n)
        return Placement(kind="tensor_parallel", n_devices=n, n_processes=1, reason=f"asked for over {n} CPU processes")
    return Placement(kind="one_device", n_devices=1, n_processes=1, reason="there is no GPU")


def _choose(
    size: TeacherSize, share: int, gpu_memory_gib: float | None, wanted: PlacementChoice, n_devices: int | None
) -> tuple[Kind, int, str] | None:
    if wanted == "one_device" or n_devices == 1:
        if wanted not in ("auto", "one_device"):
            raise RecipeError(f"teacher.placement is {wanted}, and teacher.n_devices is 1: it takes at least 2 GPUs")
        if n_devices not in (None, 1):
            raise RecipeError(f"teacher.placement is one_device, and teacher.n_devices is {n_devices}: leave one out")
        return "one_device", 1, " go on one GPU, as the recipe says"
    if wanted != "auto" and share < 2:
        raise RecipeError(f"teacher.placement is {wanted}, and a process has one GPU: ask for more gpus_per_node")
    if n_devices is not None:
        kind, why = _over(size, n_devices, wanted)
        return kind, n_devices, f" go over {n_devices} GPUs, as the recipe says{why}"
    if gpu_memory_gib is None:
        return None
    return _smallest(size, share, gpu_memory_gib, wanted)


def _smallest(size: TeacherSize, share: int, gpu_memory_gib: float, wanted: PlacementChoice) -> tuple[Kind, int, str]:
    """As few GPUs as hold the teacher, tensor parallelism before layers; all of them where they do not hold it."""
    most_gib = gpu_memory_gib - room_gib(gpu_memory_gib)
    enough = [n for n in range(1, share + 1) if share % n == 0 and size.weights_gib / n <= most_gib]
    if wanted == "auto" and 1 in enough:
        return "one_device", 1, f" fit one GPU of {gpu_memory_gib:.4g} GiB with room for a batch"
    several = [n for n in enough if n > 1]
    if not several:
        kind, why = _over(size, share, wanted) if share > 1 else ("one_device", "")
        gpus = f"{share} GPU{'' if share == 1 else 's'} of {gpu_memory_gib:.4g} GiB"
        return kind, share, f" and a batch need more than {gpus}: expect to run out of memory{why}"
    split = [n for n in several if wanted != "device_map" and _why_by_layers(size, n, wanted) is None]
    n = min(split or several)
    kind, why = _over(size, n, wanted)
    return kind, n, f" fit {n} GPUs of {gpu_memory_gib:.4g} GiB with room for a batch{why}"


def _over(size: TeacherSize, n: int, wanted: PlacementChoice) -> tuple[Kind, str]:
    """How over n > 1 GPUs, and why by layers if so. Raises RecipeError for tensor parallelism that cannot be."""
    if wanted == "tensor_parallel":
        _check_split(size, n)
        return "tensor_parallel", ""
    if wanted == "device_map":
        return "device_map", ", layer by layer as the recipe says"
    why = _why_by_layers(size, n, wanted)
    return ("tensor_parallel", "") if why is None else ("device_map", f"; layer by layer, since {why}")


def _why_by_layers(size: TeacherSize, n: int, wanted: PlacementChoice) -> str | None:
    if wanted != "tensor_parallel" and size.is_quantised:
        return "transformers cannot split every kind of quantised weights"
    return size.why_not(n)


def _check_split(size: TeacherSize, n: int) -> None:
    if why := size.why_not(n):
        raise RecipeError(
            f"teacher.placement is tensor_parallel over {n}, which cannot be: {why}; choose another n_devices, or "
            "placement device_map"
        )
