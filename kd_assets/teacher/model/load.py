"""Loading a teacher: any decoder that transformers can load, from local safetensors, and what must hold of it.

Used by `kd_assets.teacher` only; the one module that calls `from_pretrained`. The invariant: a `Teacher` is the one the
job was planned with (its fingerprint is checked), complete (no weight was filled in at random, none left out), and what
the pass takes it for: its parts are proved on the loaded weights (see `anatomy` and `head`). Code that comes with a
model, where it may run at all (see `configuration`), is part of the fingerprint and is checked before it runs.

Names: B, T = documents and tokens of a batch, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_assets.contract import TeacherParams
from kd_assets.errors import InputError, MissingInputError, RecipeError, TeacherChangedError, TeacherError
from kd_assets.library_internals import LoadingReport, whole_loading_report
from kd_assets.model_files.digests import DigestCache
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.placement import ONE_DEVICE, Placement, room_gib
from kd_assets.model_files.safetensors_file import StoredTensor
from kd_assets.model_files.size import GIB
from kd_assets.model_files.weight_files import weights_read
from kd_assets.store.codecs.state_codec import require_groups
from kd_assets.teacher.model.anatomy import dissected, is_of_the_model, proven_variant
from kd_assets.teacher.model.configuration import (
    auto_class,
    caps_attention,
    code_is_needed,
    code_of,
    keep_to_this_machine,
    read_config,
    rotary_limit,
)
from kd_assets.teacher.model.final_norm import DecoderEnd
from kd_assets.teacher.model.head import Head, configured_head
from kd_assets.teacher.model.quantised import Quantisation, loaded_quantisation, quantisation_config, stored_settings
from kd_assets.teacher.model.unused_weights import harmless_unused, stored_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROUTING = re.compile(r"experts?(?![a-z])|router|topk|sparsemoe|moegate", re.IGNORECASE)
"""In the names of classes of modules that send tokens to experts."""

WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner"),
    *("head_dim", "num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"),
)
"""Sizes in a configuration that are each a dimension of some weight, or less."""
PACKED = 16
"""Numbers that quantised weights keep in one of their files', at most: 2 bits each in 32."""
POSITIONS = re.compile(r"^(?!.*(vis|audio|encoder|tower)).*(^|\.)(wpe|embed_positions)\.weight$")
"""A text decoder's table of positions, where they are learned (GPT-2, OPT)."""

Warn = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A loaded causal language model, and where to take what the caches keep."""

    model: Any
    """The `PreTrainedModel` with its head, in eval mode on `device`."""
    decoder: nn.Module
    """The part of it that ends in the final norm: ids [B, T] → `last_hidden_state` [B, T, H]."""
    blocks: nn.ModuleList
    """Decoder blocks, 0-based."""
    blocks_unusable: str | None
    """Why the outputs of `blocks` cannot be kept as hidden states; None: they are proved to be."""
    head: Head | None
    """None when it could not be proved equal to the model's own."""
    device: torch.device
    dtype: torch.dtype
    """What it computes in; some keep their final states in float32 all the same."""
    hidden_size: int
    vocabulary_size: int
    """V: columns of the logits."""
    n_token_ids: int
    """A token id is below it: it has a row in the embedding table and a column in the logits."""
    n_parameters: int
    context_tokens: int | None
    """What the teacher was trained for (`max_position_embeddings`), where its configuration says so."""
    alone_above: int | None
    """Documents of more tokens must not share a batch (see `rotary_limit`)."""
    repeatable_tokens: int | None
    """Of a longer document this teacher does not give the same twice (see `rotary_limit`)."""
    load_s: float
    quantisation: Quantisation | None = None
    """What is quantised of it; None: nothing."""
    routed: bool = False
    """Whether tokens are routed to experts."""
    learned_positions: int | None = None
    """Tokens of the longest document that it can run at all; None: any (see `learned_positions`)."""
    unused_weights: Mapping[str, int] = field(default_factory=dict)
    """Kind → number of weights in its files that it has no place for (see `unused_weights`)."""
    end: DecoderEnd = field(default_factory=DecoderEnd)
    """Its final norm, and which states at the decoder's end cannot be kept."""

    @property
    def quantisation_in_words(self) -> str | None:
        return None if self.quantisation is None else str(self.quantisation)


def load_teacher(
    params: TeacherParams,
    *,
    digests: DigestCache | None,
    warn: Warn,
    placement: Placement = ONE_DEVICE,
    device: torch.device | None = None,
) -> Teacher:
    """Load, verify and prove the teacher of a recipe, or this process's part of it. CUDA when there is one, else CPU.

    Raises MissingInputError (no such model, or incomplete), TeacherChangedError (not the weights or the code of the
    plan), RecipeError (the recipe asks for what this model does not have, or does not allow its code) before the
    weights are read, TeacherError when the model is not one this pass can use. `warn` is told what works, but slower
    than it could.
    """
    started = time.perf_counter()
    keep_to_this_machine(remote_code=params.trust_remote_code)
    folder, dtype = model_folder(params.model, params.revision), DTYPES[params.dtype]
    if params.trust_remote_code:
        check_fingerprint(folder, params, digests)  # before any of its code runs
    config = read_config(folder, remote_code=params.trust_remote_code)
    check_recipe(params, config)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantization = quantisation_config(params.quantization, config, on_gpu=device.type == "cuda")
    settings = stored_settings(config) or params.quantization  # from_pretrained changes the configuration
    if not params.trust_remote_code:
        check_fingerprint(folder, params, digests)
    model, unused = read_model(
        folder,
        config,
        dtype=dtype,
        device=device,
        remote_code=params.trust_remote_code,
        placement=placement,
        quantization=quantization,
    )
    quantisation = loaded_quantisation(settings, model)
    teacher = as_teacher(model, device=device, warn=warn, started=started, quantisation=quantisation)
    teacher = dataclasses.replace(teacher, unused_weights=unused)
    if teacher.dtype != dtype:
        warn(f"{folder} computes in {teacher.dtype}, as its quantisation ({quantisation}) does, and not in {dtype}")
    check_teacher(params, teacher)
    return teacher


def check_fingerprint(folder: Path, params: TeacherParams, digests: DigestCache | None) -> None:
    """Raise TeacherChangedError unless the weights (and the code, where it may run) are those of the plan."""
    found = weights_fingerprint(
        folder, digests, remote_code=params.trust_remote_code, say=lambda line: print(line, flush=True)
    )
    if found != params.weights_fingerprint:
        what = "weights or the code" if params.trust_remote_code else "weights"
        raise TeacherChangedError(
            f"the {what} in {folder} are not those the job was planned with (fingerprint {found[:16]}, planned "
            f"{params.weights_fingerprint[:16]}): put them back, or materialize again so that the plan names these"
        )


def check_recipe(params: TeacherParams, config: Any) -> None:
    """Raise RecipeError for what this model cannot give, before hours are spent on loading it."""
    text = config.get_text_config(decoder=True)
    if params.topk is None and params.hidden_states is None and params.embeddings is None:
        raise RecipeError("the recipe keeps no cache: give at least one of topk, hidden_states, embeddings")
    if params.topk is not None:
        check_k(params, getattr(text, "vocab_size", None))
    if params.hidden_states is not None:
        check_blocks(params, getattr(text, "num_hidden_layers", None))
        if isinstance(hidden_size := getattr(text, "hidden_size", None), int):
            require_groups(params.hidden_states.codec, hidden_size)


def check_k(params: TeacherParams, vocabulary_size: int | None) -> None:
    assert params.topk is not None
    k, token_ids = params.topk.k, params.topk.token_ids
    if token_ids is not None:
        kept = token_ids if vocabulary_size is None else token_ids.cut(vocabulary_size)
        if k > (n_ids := 0 if kept is None else len(kept)):
            raise RecipeError(
                f"topk.k is {k}: topk.vocabulary leaves {n_ids} of the {vocabulary_size} token ids of {params.model}"
            )
    if k < 1 or (vocabulary_size is not None and k > vocabulary_size):
        raise RecipeError(f"topk.k is {k}: {params.model} has a vocabulary of {vocabulary_size}")


def check_blocks(params: TeacherParams, n_blocks: int | None) -> None:
    assert params.hidden_states is not None
    if not params.hidden_states.blocks and not params.hidden_states.final:
        raise RecipeError(
            "hidden_states.blocks is empty: name at least one decoder block (0-based), or a final state with `final`"
        )
    for block in params.hidden_states.blocks:
        if block < 0 or (n_blocks is not None and block >= n_blocks):
            last = "" if n_blocks is None else f" to {n_blocks - 1}"
            raise RecipeError(f"hidden_states.blocks has {block}: {params.model} has blocks 0{last} (0-based)")


def check_teacher(params: TeacherParams, teacher: Teacher) -> None:
    """What of `check_recipe` only the loaded model can tell."""
    if params.topk is not None:
        check_k(params, teacher.vocabulary_size)
    if params.hidden_states is not None:
        if teacher.blocks_unusable is not None and params.hidden_states.blocks:
            raise TeacherError(
                f"hidden states of {params.model} cannot be kept: {teacher.blocks_unusable}; leave hidden_states out "
                "of the recipe (the other caches do not need the blocks)"
            )
        check_blocks(params, len(teacher.blocks))
        require_groups(params.hidden_states.codec, teacher.hidden_size)
        for name in params.hidden_states.final:
            if (why := teacher.end.unusable.get(name)) is not None:
                raise TeacherError(
                    f"the final state {name} of {params.model} cannot be kept ({type(teacher.model).__name__}: {why}): "
                    "leave it out of hidden_states.final (blocks and the other caches do not need it)"
                )


def read_model(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    remote_code: bool = False,
    placement: Placement = ONE_DEVICE,
    quantization: Any = None,
) -> tuple[Any, dict[str, int]]:
    """The model with all its weights, in eval mode, and what of its files it does not use (see `unused_weights`).

    Raises TeacherError when a weight is missing, of wrong shape, or one that the model has no place for.
    """
    stored = weights_in(folder)
    check_sizes(config, [tensor for _, tensor in stored.values()], folder)
    options: dict[str, Any] = {}
    if caps_attention(config):
        # No SDPA kernel caps attention logits: it would ignore the cap or refuse, by version. Otherwise transformers
        # takes SDPA by itself wherever the architecture has it.
        options["attn_implementation"] = "eager"
    options |= layout_options(placement, device)
    if quantization is not None:
        options["quantization_config"] = quantization
    with whole_loading_report() as fit, loading_errors(folder, fit, remote_code=remote_code, quantization=quantization):
        model, report = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
            **options,
        )
    if wrong := sorted(map(str, report.get("missing_keys") or ())):
        raise TeacherError(
            f"{folder}: {len(wrong)} weights are missing, such as {wrong[0]}; transformers would fill them with random "
            "numbers: download the model again"
        )
    if fit.mismatched:
        raise TeacherError(mismatch_in_words(folder, fit.mismatched))
    unused = harmless_unused(fit.unexpected, fit.ignored, stored, config.get_text_config(decoder=True), folder=folder)
    if device.type == "cuda":
        check_layout(model, placement)
    return model.eval().requires_grad_(False), unused


def weights_in(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Every weight in a model's files, by its name."""
    files = weights_read(folder)
    try:
        return stored_weights(files)
    except MissingInputError:
        raise
    except InputError as e:
        raise TeacherError(f"{folder} has a truncated or damaged safetensors file: {e}") from e


@contextmanager
def loading_errors(folder: Path, fit: LoadingReport, *, remote_code: bool, quantization: Any) -> Iterator[None]:
    """What `from_pretrained` raises, in our words."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as e:
        raise MissingInputError(f"{folder} cannot be loaded: {e}") from e
    except SafetensorError as e:
        raise TeacherError(f"{folder} has a truncated or damaged safetensors file ({e}): download it again") from e
    except ImportError as e:
        raise TeacherError(f"{folder} needs a package that is not installed here: {e}") from e
    except ValueError as e:
        if (code := code_of(folder)) and not remote_code:
            raise RecipeError(code_is_needed(folder, code)) from e
        raise TeacherError(f"{folder} is not a causal language model that this transformers loads: {e}") from e
    except (RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        if fit.mismatched:
            raise TeacherError(mismatch_in_words(folder, fit.mismatched)) from e
        if not is_of_the_model(e) and not isinstance(e, (ArithmeticError, RecursionError)):
            raise
        if quantization is not None:
            raise TeacherError(f"{folder} cannot be quantised as teacher.quantization asks: {e}") from e
        raise TeacherError(
            f"{folder}: no model can be made of config.json and the weights ({type(e).__name__}: {e}): "
            "download it again"
        ) from e


def check_sizes(config: Any, stored: Sequence[StoredTensor], folder: Path) -> None:
    """Raise TeacherError for sizes that the weights show to be wrong, before a model of them is made: transformers
    takes memory by them (for weights that do not fit, a module for each layer) before it complains."""
    text = config.get_text_config(decoder=True)
    widest = max((n for tensor in stored for n in tensor.shape), default=0)
    weights = f"the widest of its weights has {widest:,}"
    most = {
        "hidden_size": (widest, weights),
        "vocab_size": (widest, weights),
        "num_hidden_layers": (len(stored), f"its files hold {len(stored):,} weights"),
    }
    most |= dict.fromkeys(WIDTHS, (PACKED * widest, weights))
    if any(POSITIONS.search(tensor.name) for tensor in stored):
        most["max_position_embeddings"] = (widest, weights)
    for name, (largest, what) in most.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and (size > largest or (size < 1 and name not in WIDTHS)):
            raise TeacherError(f"{folder}/config.json says {name} {size:,}, and {what}: download the model again")


def mismatch_in_words(folder: Path, mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    name, (in_file, in_model) = min(mismatched.items())
    return (
        f"{folder}: {len(mismatched)} weights are mismatched, such as {name}: {list(in_file)} in its "
        f"file and {list(in_model)} by config.json: download the model again"
    )


def layout_options(placement: Placement, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told of where the weights go: straight to their devices, without a second copy in host
    memory. By tensor parallelism each process reads its own pieces only."""
    if placement.kind == "tensor_parallel":
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=placement.n_devices)}
    if device.type != "cuda":
        return {}
    if placement.kind == "device_map":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(placement.n_devices)]
        most = {i: int(size - GIB * room_gib(size / GIB)) for i, size in enumerate(sizes)}
        return {"device_map": "balanced", "max_memory": most}
    return {"device_map": device}


def check_layout(model: Any, placement: Placement) -> None:
    """Raise TeacherError where layers were laid off the GPUs: each batch would wait for them to be copied."""
    off = {str(device) for device in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if placement.kind == "device_map" and off:
        raise TeacherError(
            f"{placement.n_devices} GPUs do not hold the weights and room for a batch (some would lie on the "
            f"{' and '.join(sorted(off))}): use more GPUs, or GPUs with more memory"
        )


def as_teacher(
    model: Any,
    *,
    device: torch.device,
    warn: Warn = lambda message: None,
    started: float | None = None,
    quantisation: Quantisation | None = None,
) -> Teacher:
    """A loaded model as a teacher: find decoder, blocks and head, and prove what the pass relies on."""
    started = time.perf_counter() if started is None else started
    config = model.config.get_text_config(decoder=True)
    n_embeddings = model.get_input_embeddings().weight.shape[0]
    anatomy = dissected(
        model,
        n_blocks=getattr(config, "num_hidden_layers", None),
        n_token_ids=n_embeddings,
        device=device,
        quantisation=quantisation,
    )
    head, difference = proven_variant(configured_head(model, config), anatomy)
    if head is None:
        warn(
            f"{type(model).__name__}: its logits are not what its head makes of its final hidden states (largest "
            f"relative difference {difference:.2g}): falling back to the model's own logits, which is slower"
        )
    alone_above = rotary_limit(config, "longrope")
    if quantisation is not None and quantisation.mixes_documents:
        alone_above = 0
        warn(
            f"quantisation by {quantisation} takes the scale of activations over a whole batch: every document runs by "
            "itself, so that it does not depend on its neighbours; scales of each token (row) are faster"
        )
    return Teacher(
        model=model,
        decoder=anatomy.decoder,
        blocks=anatomy.blocks,
        blocks_unusable=anatomy.blocks_unusable,
        head=head,
        end=anatomy.end,
        device=device,
        dtype=coarsest(anatomy.final_BTH.dtype, model.get_input_embeddings().weight.dtype),
        hidden_size=anatomy.final_BTH.shape[-1],
        vocabulary_size=anatomy.logits_BTV.shape[-1],
        n_token_ids=min(n_embeddings, anatomy.logits_BTV.shape[-1]),
        n_parameters=sum(p.numel() for p in model.parameters()),
        context_tokens=getattr(config, "max_position_embeddings", None),
        alone_above=alone_above,
        repeatable_tokens=rotary_limit(config, "dynamic"),
        load_s=time.perf_counter() - started,
        quantisation=quantisation,
        routed=any(ROUTING.search(type(module).__name__) for module in anatomy.decoder.modules()),
        learned_positions=learned_positions(
            anatomy.decoder, model.get_input_embeddings(), getattr(config, "max_position_embeddings", None)
        ),
    )


def learned_positions(decoder: nn.Module, word_embeddings: nn.Module, context_tokens: int | None) -> int | None:
    """`context_tokens` of a teacher with a table of positions (GPT-2, OPT), None of any other.

    Beyond the table's end there is nothing to be had: on a CPU an IndexError, on a GPU an assertion in a kernel, after
    which the process can do nothing more with it.
    """
    if context_tokens is None:
        return None
    tables = (m for m in decoder.modules() if isinstance(m, nn.Embedding) and m is not word_embeddings)
    is_learned = any(0 <= table.num_embeddings - context_tokens <= 2 for table in tables)  # OPT's begins at 2
    return context_tokens if is_learned else None


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)
