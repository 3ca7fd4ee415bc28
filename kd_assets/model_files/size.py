"""How large a teacher is, from its configuration and the headers of its weights; nothing of the weights is read.

Anyone may import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.errors import InputError
from kd_assets.model_files.reading import read_json
from kd_assets.model_files.safetensors_file import StoredTensor, stored_tensors
from kd_assets.model_files.weight_files import weights_read

GIB = 2**30

BYTES_OF = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}

_STORED_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating-point types of safetensors that loading casts to the recipe's. Narrower ones are quantised and stay."""

_STORED_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}


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
    """Whether transformers has a tensor-parallel plan for it; None where transformers was not asked."""

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
class TeacherShape:
    """What of a teacher decides what a pass costs; known without its weights."""

    parameters: float
    """All of them, the embeddings included."""
    hidden_size: int
    n_blocks: int
    vocabulary: int
    tied_embeddings: bool = False
    """Whether the head is the table of embeddings."""

    def flops_a_token(self, *, n_blocks: int, with_head: bool) -> float:
        """Of the first `n_blocks` blocks, with the head or without: two for each parameter that a token meets.

        (Kaplan et al. 2020, section 2.1; attention over long texts adds a little. Embeddings are looked up.)
        """
        table = self.vocabulary * self.hidden_size
        in_blocks = max(self.parameters - table * (1 if self.tied_embeddings else 2), 0.0)
        return 2 * (in_blocks * min(n_blocks, self.n_blocks) / self.n_blocks + (table if with_head else 0))


# ----------------------------------------------------------------------------------------------------- what it weighs


def teacher_shape(folder: Path) -> TeacherShape:
    """Of the teacher in a folder, from its configuration and the heads of its safetensors files.

    Raises MissingInputError where they are missing, InputError where the configuration does not say.
    """
    config = _read_config(folder)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    try:
        hidden_size, n_blocks = int(text["hidden_size"]), int(text["num_hidden_layers"])
        vocabulary = int(text["vocab_size"])
    except (LookupError, TypeError, ValueError) as e:
        raise InputError(
            f"{folder}/config.json does not say how large the teacher is ({e}): set teacher.size of the recipe"
        ) from e
    tensors = [tensor for path in weights_read(folder) for tensor in stored_tensors(path)]
    return TeacherShape(
        parameters=float(sum(tensor.n_numbers for tensor in tensors)),
        hidden_size=hidden_size,
        n_blocks=n_blocks,
        vocabulary=vocabulary,
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )


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
        _device_bytes(tensor, dtype=dtype, bits=bits, as_stored=is_stored_quantised)
        for path in weights_read(folder)
        for tensor in stored_tensors(path)
    )
    if not n_bytes:
        raise InputError(f"the weights in {folder} are empty: download the model again")
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


def _device_bytes(tensor: StoredTensor, *, dtype: str, bits: float | None, as_stored: bool) -> float:
    stored_bytes = _STORED_FLOATS.get(tensor.dtype) or _STORED_OTHERS.get(tensor.dtype, 1)
    if as_stored or tensor.dtype not in _STORED_FLOATS:
        return tensor.n_numbers * stored_bytes
    if bits is not None and not any(part in tensor.name for part in ("embed", "head", "norm")):
        return tensor.n_numbers * bits / 8
    return tensor.n_numbers * BYTES_OF[dtype]


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", "a model folder holds one beside its weights")
    return config if isinstance(config, dict) else {}


def _numbers(value: Any) -> list[int]:
    """Of a number, or of a list with one for each layer; 0 stands for none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]


def _divisors(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Empty where the configuration names no heads."""
    heads = _numbers(config.get("num_attention_heads"))
    if not heads:
        return ()
    names = ("num_key_value_heads", "vocab_size", "intermediate_size", "moe_intermediate_size")
    return tuple(sorted({*heads, *(n for name in names for n in _numbers(config.get(name)))}))
