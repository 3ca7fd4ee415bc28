"""How a teacher lies on the GPUs of a node: on one each, split by tensor parallelism, or layer by layer.

Anyone may import it; standard library only. The control plane asks before it submits, with what the cluster's profile
says of the GPUs, since the answer decides how many processes share a task; a process on the node asks again, with the
GPUs that it sees. The invariant: the same facts give the same answer on either side, and every answer has its reason.

The order of preference is by speed: a GPU that holds the whole teacher needs no word with another, so as many
processes as GPUs each take their share of the partitions; else as few GPUs as hold it, by tensor parallelism, where all
of them work on each batch; else, for what has no plan for that, layers laid over GPUs, of which one works at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_assets.errors import InputError, MissingInputError, RecipeError

Kind = Literal["one_device", "tensor_parallel", "device_map"]
Wanted = Literal["auto", "one_device", "tensor_parallel", "device_map"]

GIB = 2**30
ROOM_GIB = 6.0
"""Of each GPU, for what is not weights: CUDA's own, a batch's activations, a chunk of logits. 8,192 tokens through a
block of 70B need about 2 GiB, and 2 GiB go to the rest; more room makes larger batches, which gain little."""
ROOM_SHARE = 0.15
"""At most this share of a GPU: a small one runs a small teacher."""

BYTES_OF = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_STORED_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating-point types of safetensors that loading casts to the recipe's. Narrower ones are quantised and stay."""
_STORED_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
LARGEST_HEADER_BYTES = 100 * 2**20
"""As safetensors itself has it."""

_WORDS: Mapping[Kind, str] = {
    "one_device": "on one device",
    "tensor_parallel": "tensor parallel over",
    "device_map": "layer by layer over",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSize:
    """What of a teacher decides where it fits."""

    weights_gib: float
    """On the devices: in the precision it runs in."""
    precision: str
    """In words: `bfloat16`, `4-bit bfloat16`."""
    model_type: str
    divisors: tuple[int, ...]
    """Numbers that tensor parallelism cuts into equal pieces: heads, key-value heads, vocabulary, inner sizes."""
    is_quantised: bool = False
    has_plan: bool | None = None
    """Whether transformers has a tensor-parallel plan for it; None where nobody has asked transformers."""

    @property
    def in_words(self) -> str:
        return f"{self.weights_gib:.1f} GiB of weights in {self.precision}"

    def why_not(self, n: int) -> str | None:
        """Why tensor parallelism over `n` cannot be; None where it can."""
        if self.has_plan is False:
            return f"transformers has no tensor-parallel plan for {self.model_type}"
        if not self.divisors:
            return f"the configuration of {self.model_type} does not say how many heads it has"
        if odd := [d for d in self.divisors if d % n]:
            return f"its sizes {', '.join(map(str, odd))} do not divide by {n}"
        return None


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
    wanted: Wanted = "auto",
    n_devices: int | None = None,
    n_processes: int | None = None,
) -> Placement | None:
    """How a teacher lies on a node of `n_gpus` GPUs, each of `gpu_memory_gib`; 0 GPUs: on the CPU.

    `wanted`, `n_devices`: the recipe's word. `n_processes`: how many processes share the GPUs, where that is settled;
    None: as many as the answer leaves room for. Returns None where it takes the memory to know and nobody knows it.
    Raises RecipeError for what cannot be.
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


def _on_cpu(size: TeacherSize, wanted: Wanted, n_devices: int | None) -> Placement:
    """Only when asked for in so many words is a teacher split without GPUs, which is good for tests alone."""
    n = (n_devices or 2) if wanted == "tensor_parallel" else 1
    if n > 1:
        _check_split(size, n)
        return Placement(kind="tensor_parallel", n_devices=n, n_processes=1, reason=f"asked for over {n} CPU processes")
    return Placement(kind="one_device", n_devices=1, n_processes=1, reason="there is no GPU")


def _choose(
    size: TeacherSize, share: int, gpu_memory_gib: float | None, wanted: Wanted, n_devices: int | None
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


def _smallest(size: TeacherSize, share: int, gpu_memory_gib: float, wanted: Wanted) -> tuple[Kind, int, str]:
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


def _over(size: TeacherSize, n: int, wanted: Wanted) -> tuple[Kind, str]:
    """How over n > 1 GPUs, and why by layers if so. Raises RecipeError for tensor parallelism that cannot be."""
    if wanted == "tensor_parallel":
        _check_split(size, n)
        return "tensor_parallel", ""
    if wanted == "device_map":
        return "device_map", ", layer by layer as the recipe says"
    why = _why_by_layers(size, n, wanted)
    return ("tensor_parallel", "") if why is None else ("device_map", f"; layer by layer, since {why}")


def _why_by_layers(size: TeacherSize, n: int, wanted: Wanted) -> str | None:
    if wanted != "tensor_parallel" and size.is_quantised:
        return "transformers cannot split every kind of quantised weights"
    return size.why_not(n)


def _check_split(size: TeacherSize, n: int) -> None:
    if why := size.why_not(n):
        raise RecipeError(
            f"teacher.placement is tensor_parallel over {n}, which cannot be: {why}; choose another n_devices, or "
            "placement device_map"
        )


# ----------------------------------------------------------------------------------------------------- what it weighs


def teacher_size(
    folder: Path, *, dtype: str, quantization: Mapping[str, Any] | None = None, has_plan: bool | None = None
) -> TeacherSize:
    """The size of the teacher in a folder, from its configuration and the heads of its safetensors files.

    Raises MissingInputError where they are missing, InputError where they cannot be read.
    """
    config = _read_config(folder)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else {}
    is_stored_quantised = isinstance(config.get("quantization_config") or text.get("quantization_config"), dict)
    bits = None if quantization is None or is_stored_quantised else quantised_bits(quantization)
    n_bytes = sum(
        _device_bytes(name, stored, n, dtype=dtype, bits=bits, as_stored=is_stored_quantised)
        for path in sorted(folder.glob("*.safetensors"))
        for name, stored, n in _tensors(path)
    )
    if not n_bytes:
        raise MissingInputError(f"{folder} holds no weights in *.safetensors")
    precision = dtype if bits is None else f"{bits:g}-bit {dtype}"
    return TeacherSize(
        weights_gib=n_bytes / GIB,
        precision="their stored precision" if is_stored_quantised else precision,
        model_type=str(config.get("model_type", "an unnamed architecture")),
        divisors=_divisors({**config, **text}),
        is_quantised=is_stored_quantised or quantization is not None,
        has_plan=has_plan,
    )


def quantised_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of a weight under a quantisation on loading, scales included; None where this does not say (then the
    weights are counted as if they stayed as they are)."""
    if quantization.get("load_in_4bit"):
        return 4.5
    if quantization.get("load_in_8bit"):
        return 8.0
    if isinstance(bits := quantization.get("bits") or quantization.get("nbits"), int):
        return bits + 0.5
    said = " ".join(str(quantization.get(name, "")).lower() for name in ("quant_method", "weights", "quant_type"))
    for word, n_bits in (("fp8", 8.0), ("float8", 8.0), ("int8", 8.0), ("eetq", 8.0), ("int4", 4.5), ("fp4", 4.5)):
        if word in said:
            return n_bits
    return None


def _device_bytes(name: str, stored: str, n: int, *, dtype: str, bits: float | None, as_stored: bool) -> float:
    stored_bytes = _STORED_FLOATS.get(stored) or _STORED_OTHERS.get(stored, 1)
    if as_stored or stored not in _STORED_FLOATS:
        return n * stored_bytes
    if bits is not None and not any(part in name for part in ("embed", "head", "norm")):
        return n * bits / 8
    return n * BYTES_OF[dtype]


def _tensors(path: Path) -> Iterator[tuple[str, str, int]]:
    """(name, stored type, numbers) of each tensor, from the head of a file: 8 bytes with its length, then JSON."""
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(f"a head of {length} bytes")
            head = json.loads(f.read(length))
        for name, tensor in head.items():
            if name != "__metadata__":
                yield name, str(tensor["dtype"]), math.prod(tensor["shape"])
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, struct.error, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is no safetensors file ({e}): download it again") from e


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as e:
        raise MissingInputError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}): download it again") from e
    return config if isinstance(config, dict) else {}


def _divisors(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Empty where the configuration names no heads."""
    heads = _numbers(config.get("num_attention_heads"))
    if not heads:
        return ()
    names = ("num_key_value_heads", "vocab_size", "intermediate_size", "moe_intermediate_size")
    return tuple(sorted({*heads, *(n for name in names for n in _numbers(config.get(name)))}))


def _numbers(value: Any) -> list[int]:
    """Of a number, or of a list with one for each layer; 0 stands for none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
