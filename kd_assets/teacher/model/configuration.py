"""What a model's folder says of it before its weights are read; and the code in it, which runs only when it may.

Used by `kd_assets.teacher` only. The invariant: nothing comes from the network, neither files nor code nor kernels, and
code that comes with a model runs only when the recipe says so, and then only the code in the model's own folder.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.library_internals import class_that_loads
from kd_assets.model_files.reading import read_json

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Classes of transformers that load a language model, in the order to try. A multimodal model is run on text alone."""


def keep_to_this_machine(*, remote_code: bool) -> None:
    """Tell the Hugging Face libraries, before they are imported, to fetch nothing: neither files nor compiled kernels
    (whoever has kernels in the cache and wants them sets USE_HUB_KERNELS). Code that comes with a model is copied
    before it runs: to a folder of this process, where none is given, since other tasks write to the one in the home."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    if remote_code and "HF_MODULES_CACHE" not in os.environ:
        folder = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="kd-assets-code-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def read_config(folder: Path, *, remote_code: bool = False) -> Any:
    """The model's configuration. Code that comes with a model runs only with `remote_code`, and only the folder's own.

    Raises MissingInputError without a configuration that this transformers knows, RecipeError when it takes code that
    the recipe does not allow.
    """
    from transformers import AutoConfig

    code = code_of(folder)
    if remote_code:
        for name in code:
            if "--" in name:
                raise RecipeError(
                    f"{folder}/config.json names code in another repository ({name}), and only code in the model's own "
                    'folder runs: put that file there and take "' + name.split("--")[0] + '--" out of auto_map'
                )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
    except Exception as e:  # transformers checks types and values of each field with errors of many kinds
        if code and not remote_code:
            raise RecipeError(code_is_needed(folder, code)) from e
        raise MissingInputError(
            f"{folder} holds no configuration of a model that this transformers knows ({e}): name a folder that "
            "save_pretrained() wrote, or install a transformers that knows the architecture"
        ) from e


def code_of(folder: Path) -> list[str]:
    """The classes that a model's configuration takes from code beside it ("modeling_x.XForCausalLM"), by `auto_map`."""
    try:
        config = read_json(folder / "config.json", "it describes the model")
    except MissingInputError:
        return []  # for transformers to complain of
    names: list[str] = []
    nested = [config]
    while nested:
        value = nested.pop()
        if isinstance(value, dict):
            auto_map = value.get("auto_map")
            for entry in auto_map.values() if isinstance(auto_map, dict) else ():
                names += [name for name in (entry if isinstance(entry, list) else [entry]) if isinstance(name, str)]
            nested += value.values()
    return names


def code_is_needed(folder: Path, code: list[str]) -> str:
    return (
        f"{folder} needs Python code that comes with it ({code[0]}), and such code runs only when the recipe says so: "
        "read it, then set `teacher.trust_remote_code: true`"
    )


def auto_class(config: Any) -> Any:
    """The class of transformers that loads such a model: the one that makes the architecture the weights were saved
    from, else the first that knows the configuration."""
    import transformers

    made_by = {c: class_that_loads(c, config) for c in (getattr(transformers, name) for name in AUTO_CLASSES)}
    known = {c: made for c, made in made_by.items() if made is not None}
    of_the_weights = (c for c, made in known.items() if made.__name__ in (config.architectures or ()))
    return next(of_the_weights, next(iter(known), transformers.AutoModelForCausalLM))


def caps_attention(config: Any) -> bool:
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


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
