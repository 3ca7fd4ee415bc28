"""Quantised teachers: which quantisation a recipe or a checkpoint asks for, whether it can be had here, what it is.

Used by `kd_assets.teacher` only. The quantising itself is transformers' own, by its configuration objects; a checkpoint
that is quantised already is used as it is, never quantised again. The invariant: what cannot be loaded is refused
before the weights are read, and a quantised teacher never passes for a plain one: `Quantisation` is in its event,
provenance and facts, and says what the checks may expect of it.

Two things about a quantisation matter to the caches. Quantised weights are only other weights: the teacher's numbers
are as repeatable as those of a plain one. Quantised activations are not: on which side of a rounding boundary a number
falls depends on its last bits, so that any two ways of computing the same (another batch, another kernel) end up a
quantisation step apart, whatever the precision (see `ACTIVATION_RTOL`). And where the scale of activations is taken
over a whole batch, a document's numbers depend on its neighbours: such a teacher runs every document by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd_assets.errors import MissingInputError, RecipeError

ACTIVATION_RTOL = 2.0**-2
"""How far two ways of computing the same may lie apart with quantised activations: of the largest logit for logits, of
the norm for states. A difference of d before rounding to steps of q is about sqrt(d x q) after it, and so, block after
block, goes to q itself. Measured with 8-bit activations and random Llamas of 3, 8 and 24 blocks, in float32 as in
bfloat16: 2^-5 to 2^-3.5; without quantised activations 2^-19 and 2^-5."""

Activations = Literal["plain", "static", "by_token", "by_batch", "unknown"]
"""How a quantisation treats what goes into a matrix product: not at all, with scales fixed beforehand, with scales of
each token, or of each batch; unknown: a method this table does not know."""

WEIGHTS_ONLY = frozenset(
    {
        "gptq",
        "awq",
        "aqlm",
        "vptq",
        "quanto",
        "eetq",
        "higgs",
        "hqq",
        "spqr",
        "auto-round",
        "mxfp4",
        "sinq",
        "gguf",
        "metal",
    }
)
"""Methods of transformers that leave activations as they are."""
BY_TOKEN = frozenset({"fbgemm_fp8", "bitnet"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """What is quantised of a teacher, and how."""

    method: str
    """transformers' `quant_method`."""
    scheme: str
    """In words: "int8 weight only"."""
    activations: Activations
    dequantised: bool = False
    """Quantised in its files, and widened again on loading, for want of a kernel or because the recipe says so."""

    def __str__(self) -> str:
        """What manifests keep: "torchao int8 weight only"."""
        return f"{self.method} {self.scheme}".strip() + (", dequantised on loading" if self.dequantised else "")

    @property
    def rounds_activations(self) -> bool:
        return self.activations != "plain" and not self.dequantised

    @property
    def mixes_documents(self) -> bool:
        """Whether a document's numbers depend on what else is in its batch."""
        return self.activations == "by_batch" and not self.dequantised


def tolerance(rtol: float, quantisation: Quantisation | None) -> float:
    """`rtol`, widened for a teacher whose activations are rounded (see `ACTIVATION_RTOL`)."""
    if quantisation is None or not quantisation.rounds_activations:
        return rtol
    return max(rtol, ACTIVATION_RTOL)


def quantisation_config(asked: Mapping[str, Any] | None, config: Any, *, on_gpu: bool) -> Any | None:
    """What `from_pretrained` takes as `quantization_config`; None where the checkpoint decides, or nothing is asked.

    `asked`: what the recipe asks for; `config`: the model's configuration. Raises RecipeError for what transformers
    does not know or cannot do with this model, and MissingInputError for a package or a GPU that is not there.
    """
    stored = stored_settings(config)
    if stored is not None and asked is not None:
        _refuse_another(asked, stored)
    settings = stored if stored is not None else asked
    if settings is None:
        return None
    ours = _checked(settings, stored is not None, on_gpu=on_gpu)
    return None if stored is not None else ours


def stored_settings(config: Any) -> dict[str, Any] | None:
    """The quantisation that the checkpoint's configuration states, as transformers' dict; None: it states none."""
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, Mapping) else found.to_dict())
    return None


def loaded_quantisation(settings: Mapping[str, Any] | None, model: Any) -> Quantisation | None:
    """What a loaded model is. `settings`: those of its checkpoint or of the recipe; None: it is not quantised."""
    if settings is None:
        return None
    # transformers takes the configuration away from a model that it widened again.
    return described(settings, dequantised=stored_settings(model.config) is None)


def described(settings: Mapping[str, Any], *, dequantised: bool = False) -> Quantisation:
    """What a quantisation configuration means, in our terms."""
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")) or "bitsandbytes")
    scheme, activations = _DESCRIPTIONS.get(method, _any_other)(settings)
    return Quantisation(method=method, scheme=scheme, activations=activations, dequantised=dequantised)


def _refuse_another(asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    different = sorted(key for key, value in asked.items() if stored.get(key) != value)
    if different:
        raise RecipeError(
            f"the recipe asks for a quantisation ({described(asked)}), and the checkpoint is quantised already "
            f"({described(stored)}; {different[0]!r} differs): leave teacher.quantization out to use it as it is, or "
            "name an unquantised checkpoint"
        )


def _checked(settings: Mapping[str, Any], pre_quantised: bool, *, on_gpu: bool) -> Any:
    """transformers' object for these settings; its own checks of packages and devices are made."""
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    whose = "the checkpoint's quantisation" if pre_quantised else "teacher.quantization"
    try:
        config = AutoQuantizationConfig.from_dict(dict(settings))
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=pre_quantised)
        quantizer.validate_environment(device_map={"": "cuda" if on_gpu else "cpu"}, weights_only=True)
    except (ImportError, RuntimeError, NotImplementedError) as e:
        raise MissingInputError(
            f"{whose} ({settings.get('quant_method')}) needs what this machine does not have: {e}; install the package "
            "into the compute environment, or choose another quantisation"
        ) from e
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as e:
        remedy = (
            "use another checkpoint of this model"
            if pre_quantised
            else "give the dict that the to_dict() of its transformers configuration gives, with its quant_method"
        )
        raise RecipeError(f"{whose} is none that this transformers can use ({type(e).__name__}: {e}); {remedy}") from e
    return config


def _torchao(settings: Mapping[str, Any]) -> tuple[str, Activations]:
    """By the name of torchao's configuration class, as it writes it."""
    quant_type = settings.get("quant_type")
    default = quant_type.get("default") if isinstance(quant_type, Mapping) else None
    if not isinstance(default, Mapping):
        return "", "unknown"
    name = str(default.get("_type", ""))
    scheme = " ".join(re.findall(r"[A-Z][a-z0-9]*", name.removesuffix("Config"))).lower()
    if "StaticActivation" in name:
        return scheme, "static"
    if "DynamicActivation" not in name:
        return scheme, "plain" if name.endswith("WeightOnlyConfig") else "unknown"
    data = default.get("_data")
    granularity = data.get("granularity") if isinstance(data, Mapping) else None
    of_activations = granularity[0] if isinstance(granularity, list) and granularity else granularity
    by_batch = isinstance(of_activations, Mapping) and of_activations.get("_type") == "PerTensor"
    return scheme, "by_batch" if by_batch else "by_token"


def _bitsandbytes(settings: Mapping[str, Any]) -> tuple[str, Activations]:
    """Its 8-bit products take columns with outliers, anywhere in the batch, in 16 bits (LLM.int8(), section 3.2)."""
    if settings.get("load_in_4bit"):
        return f"4 bit {settings.get('bnb_4bit_quant_type', 'fp4')} weight only", "plain"
    return "int8", "by_batch" if settings.get("llm_int8_threshold", 6.0) else "by_token"


def _fp8(settings: Mapping[str, Any]) -> tuple[str, Activations]:
    if settings.get("dequantize"):
        return "fp8 weights", "plain"
    static = settings.get("activation_scheme", "dynamic") == "static"
    return f"weights in blocks, {'static' if static else 'dynamic'} activations", "static" if static else "by_token"


def _compressed_tensors(settings: Mapping[str, Any]) -> tuple[str, Activations]:
    groups = settings.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    inputs = [g["input_activations"] for g in schemes if g.get("input_activations")]
    bits = sorted({int(g["weights"]["num_bits"]) for g in schemes if g.get("weights")})
    scheme = f"{settings.get('format', '')} {' and '.join(map(str, bits))} bit".strip()
    if not schemes:
        return scheme, "unknown"
    if not inputs:
        return f"{scheme} weight only", "plain"
    dynamic = [i for i in inputs if i.get("dynamic")]
    if not dynamic:
        return f"{scheme}, static activations", "static"
    by_batch = any(i.get("strategy") == "tensor" for i in dynamic)
    return f"{scheme}, dynamic activations", "by_batch" if by_batch else "by_token"


def _any_other(settings: Mapping[str, Any]) -> tuple[str, Activations]:
    method, bits = settings.get("quant_method"), settings.get("bits", settings.get("nbits"))
    scheme = f"{bits} bit" if bits else ""
    if method in WEIGHTS_ONLY:
        return f"{scheme} weight only".strip(), "plain"
    return scheme, "by_token" if method in BY_TOKEN else "unknown"


_DESCRIPTIONS = {
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
