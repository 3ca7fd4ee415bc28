"""Loading a teacher: any decoder that transformers knows, from local safetensors, and what must hold of it.

Used by `kd_assets.teacher` only; the one module that calls `from_pretrained`. The invariant: a `Teacher` is the one the
job was planned with (its fingerprint is checked), complete (no weight was left to chance), causal (a document's prefix
does not feel what follows), and its blocks and head are what the caches take them for; all proved on the loaded
weights by one small forward pass.

Names: B, T = documents and tokens of the probe, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_assets.contract import TeacherParams
from kd_assets.errors import MissingInputError, RecipeError, TeacherChangedError, TeacherError
from kd_assets.identity import DigestCache, model_folder, weights_fingerprint
from kd_assets.teacher.head import Head, configured_head, proven_head, relative_difference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PROBE_TOKENS = 16
CAUSAL_RTOL = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""How far a prefix may feel its suffix, relative to the largest state: the noise of batched kernels, many roundings."""

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
    head: Head | None
    """None when it could not be proved equal to the model's own."""
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    vocabulary_size: int
    """V: columns of the logits."""
    n_token_ids: int
    """Rows of the embedding table: a token id is below it."""
    n_parameters: int
    context_tokens: int | None
    """What the teacher was trained for (`max_position_embeddings`), where its configuration says so."""
    alone_above: int | None
    """Documents of more tokens must not share a batch (see `rotary_limit`)."""
    repeatable_tokens: int | None
    """Of a longer document this teacher does not give the same twice (see `rotary_limit`)."""
    load_s: float


def load_teacher(params: TeacherParams, *, digests: DigestCache | None, warn: Warn) -> Teacher:
    """Load, verify and prove the teacher of a recipe. CUDA when there is one, else CPU.

    Raises MissingInputError (no such model, or incomplete), TeacherChangedError (not the weights of the plan),
    RecipeError (the recipe asks for what this model does not have) before the weights are read, TeacherError when
    the model is not one this pass can use. `warn` is told what works, but slower than it could.
    """
    started = time.perf_counter()
    folder = model_folder(params.model, params.revision)
    check_recipe(params, read_config(folder))
    found = weights_fingerprint(folder, digests)
    if found != params.weights_fingerprint:
        raise TeacherChangedError(
            f"the weights in {folder} are not those the job was planned with (fingerprint {found[:16]}, planned "
            f"{params.weights_fingerprint[:16]}): put them back, or materialize again so that the plan names these"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(folder, DTYPES[params.dtype], device)
    return as_teacher(model, device=device, warn=warn, started=started)


def read_config(folder: Path) -> Any:
    """The model's configuration. Code that comes with a model is never run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise MissingInputError(
            f"{folder} holds no configuration of a model that this transformers knows ({e}): name a folder that "
            "save_pretrained() wrote, or install a transformers that knows the architecture"
        ) from e


def check_recipe(params: TeacherParams, config: Any) -> None:
    """Raise RecipeError for what this model cannot give, before hours are spent on loading it."""
    text = config.get_text_config(decoder=True)
    if params.topk is None and params.hidden_states is None and params.embeddings is None:
        raise RecipeError("the recipe keeps no cache: give at least one of topk, hidden_states, embeddings")
    if params.topk is not None and not 1 <= params.topk.k <= text.vocab_size:
        raise RecipeError(f"topk.k is {params.topk.k}: {params.model} has a vocabulary of {text.vocab_size}")
    if params.hidden_states is not None:
        n_blocks = text.num_hidden_layers
        if not params.hidden_states.blocks:
            raise RecipeError("hidden_states.blocks is empty: name at least one decoder block (0-based)")
        for block in params.hidden_states.blocks:
            if not 0 <= block < n_blocks:
                raise RecipeError(
                    f"hidden_states.blocks has {block}: {params.model} has blocks 0 to {n_blocks - 1} (0-based)"
                )


def read_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with all its weights, in eval mode. Raises TeacherError when a weight is missing or of wrong shape."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    options: dict[str, Any] = {}
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        # No SDPA kernel caps attention logits: it would ignore the cap or refuse, by version. Otherwise transformers
        # takes SDPA by itself wherever the architecture has it.
        options["attn_implementation"] = "eager"
    if device.type == "cuda":
        options["device_map"] = device  # straight to the device, without a second copy in host memory
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except OSError as e:
        raise MissingInputError(f"{folder} cannot be loaded: {e}") from e
    except SafetensorError as e:
        raise TeacherError(f"{folder} has a truncated or damaged safetensors file ({e}): download it again") from e
    except ValueError as e:
        raise TeacherError(f"{folder} is not a causal language model that this transformers loads: {e}") from e
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report.get(what) or ())):
            raise TeacherError(
                f"{folder}: {len(wrong)} weights are {what.removesuffix('_keys')}, such as {wrong[0]}; transformers "
                "would fill them with random numbers: download the model again"
            )
    return model.eval().requires_grad_(False)


def as_teacher(
    model: Any, *, device: torch.device, warn: Warn = lambda message: None, started: float | None = None
) -> Teacher:
    """A loaded model as a teacher: find decoder, blocks and head, and prove what the pass relies on."""
    started = time.perf_counter() if started is None else started
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    blocks = find_blocks(decoder, config.num_hidden_layers)
    n_token_ids = model.get_input_embeddings().weight.shape[0]
    probe = run_probe(model, decoder, blocks, n_token_ids=n_token_ids, device=device)
    prove_causal(probe.final_BTH)
    head, difference = proven_head(configured_head(model, config), probe.final_BTH, probe.logits_BTV)
    if head is None:
        warn(
            f"{type(model).__name__}: its logits are not what its head makes of its final hidden states (largest "
            f"relative difference {difference:.2g}): falling back to the model's own logits, which is slower"
        )
    return Teacher(
        model=model,
        decoder=decoder,
        blocks=blocks,
        head=head,
        device=device,
        dtype=probe.final_BTH.dtype,
        hidden_size=probe.final_BTH.shape[-1],
        vocabulary_size=probe.logits_BTV.shape[-1],
        n_token_ids=n_token_ids,
        n_parameters=sum(p.numel() for p in model.parameters()),
        context_tokens=getattr(config, "max_position_embeddings", None),
        alone_above=rotary_limit(config, "longrope"),
        repeatable_tokens=rotary_limit(config, "dynamic"),
        load_s=time.perf_counter() - started,
    )


def find_blocks(decoder: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The decoder's list of blocks, whatever the architecture calls it (layers, h, ...)."""
    found = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == n_blocks]
    if len(found) != 1:
        raise TeacherError(
            f"{type(decoder).__name__} has {len(found)} lists of {n_blocks} modules, expected one list of decoder "
            "blocks: this architecture is not supported yet"
        )
    return found[0]


def rotary_limit(config: Any, rope_type: str) -> int | None:
    """Tokens up to which rotary embeddings of this type do not look at the length; None where none is of this type.

    Two types do beyond it (transformers, `modeling_rope_utils.dynamic_rope_update`). `longrope` chooses frequencies by
    the longest document of the batch, so that a longer one must run alone to be itself. `dynamic` even keeps those of
    the longest sequence it ever saw: what it gives for a longer one depends on what ran before.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [p for p in parameters.values() if isinstance(p, dict)]
    limits = [
        p.get("original_max_position_embeddings") or config.max_position_embeddings
        for p in per_layer_type or [parameters]
        if p.get("rope_type") == rope_type
    ]
    return min(limits, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What the model gives for two rows of tokens that share their first half."""

    final_BTH: Tensor
    """After the final norm."""
    logits_BTV: Tensor
    """The model's own."""


@torch.inference_mode()
def run_probe(
    model: Any, decoder: nn.Module, blocks: nn.ModuleList, *, n_token_ids: int, device: torch.device
) -> Probe:
    """One small forward of the whole model. Raises TeacherError when a block's output is not one state a token."""
    ids_BT = probe_ids(n_token_ids).to(device)
    with tapped((decoder, *blocks)) as outputs:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    final_BTH = outputs[decoder]
    for n, block in enumerate(blocks):
        if outputs[block].shape != final_BTH.shape:
            raise TeacherError(
                f"block {n} of {type(decoder).__name__} gives {list(outputs[block].shape)}, expected a state a token "
                f"{list(final_BTH.shape)}: this architecture is not supported yet"
            )
    return Probe(final_BTH=final_BTH, logits_BTV=logits_BTV)


def probe_ids(n_token_ids: int) -> Tensor:
    """int64 [2, `PROBE_TOKENS`]: fixed ids spread over the vocabulary, equal in the first half of both rows."""
    ids_BT = (torch.arange(2 * PROBE_TOKENS) * 7919 % n_token_ids).view(2, PROBE_TOKENS)
    ids_BT[1, : PROBE_TOKENS // 2] = ids_BT[0, : PROBE_TOKENS // 2]
    return ids_BT


def prove_causal(final_BTH: Tensor) -> None:
    """Raise TeacherError unless the probe's shared prefix has the same states before either suffix.

    Right padding without a mask, and one pass for caches of different `max_length`, are exact only then.
    """
    half = PROBE_TOKENS // 2
    first_TH, second_TH = final_BTH[0, :half].float(), final_BTH[1, :half].float()
    difference = relative_difference(first_TH, second_TH)
    if difference > CAUSAL_RTOL[final_BTH.dtype]:
        raise TeacherError(
            f"the teacher is not causal: a token's state changes with what follows (relative difference "
            f"{difference:.2g}); only causal language models have a next-token distribution at every position"
        )


@contextmanager
def tapped(modules: tuple[nn.Module, ...]) -> Iterator[dict[nn.Module, Tensor]]:
    """Keep the output of each of these modules while the body runs."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = state_of(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def state_of(output: Any) -> Tensor:
    """The hidden state in a module's output: itself, `last_hidden_state`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    state = getattr(output, "last_hidden_state", None)
    return state if isinstance(state, Tensor) else output[0]
