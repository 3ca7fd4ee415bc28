"""Loading: what is refused, before and after the weights are read, and what the message says to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_assets.contract import HiddenStateParams, TopkParams
from kd_assets.errors import MissingInputError, RecipeError, TeacherChangedError, TeacherError
from kd_assets.teacher.model.configuration import read_config, rotary_limit
from kd_assets.teacher.model.load import as_teacher, load_teacher, read_model
from kd_assets_tests.teacher.tiny import (
    HIDDEN_SIZE,
    LONGROPE,
    N_BLOCKS,
    VOCABULARY,
    save_teacher,
    tiny_config,
    tiny_model,
    tiny_params,
)

CPU = torch.device("cpu")


def no_warning(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher of mine")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_is_loaded_from_its_folder_in_the_recipes_precision(folder: Path, dtype: str) -> None:
    teacher = load_teacher(tiny_params(folder, dtype=dtype), digests=None, warn=no_warning)
    assert teacher.dtype == getattr(torch, dtype)
    assert (teacher.hidden_size, teacher.vocabulary_size, len(teacher.blocks)) == (HIDDEN_SIZE, VOCABULARY, N_BLOCKS)
    assert teacher.n_token_ids == VOCABULARY
    assert teacher.head is not None
    assert teacher.context_tokens == 256
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_gemma2_is_loaded_with_attention_that_can_cap_logits(tmp_path: Path) -> None:
    params = tiny_params(save_teacher(tmp_path / "gemma2", "gemma2"))
    assert load_teacher(params, digests=None, warn=no_warning).model.config._attn_implementation == "eager"


def test_llama_is_loaded_with_sdpa(folder: Path) -> None:
    teacher = load_teacher(tiny_params(folder), digests=None, warn=no_warning)
    assert teacher.model.config._attn_implementation == "sdpa"


def test_changed_weights_are_refused(folder: Path) -> None:
    params = tiny_params(folder, weights_fingerprint="f" * 64)
    with pytest.raises(TeacherChangedError, match="planned ffffffffffffffff"):
        load_teacher(params, digests=None, warn=no_warning)


def test_missing_teacher_says_what_to_do(folder: Path) -> None:
    params = dataclasses.replace(tiny_params(folder), model="nobody/no-such-teacher")
    with pytest.raises(MissingInputError, match="hf download nobody/no-such-teacher"):
        load_teacher(params, digests=None, warn=no_warning)


def test_teacher_without_safetensors_is_refused(folder: Path) -> None:
    params = tiny_params(folder)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(MissingInputError, match=r"holds no \*\.safetensors"):
        load_teacher(params, digests=None, warn=no_warning)


def test_damaged_safetensors_file_is_refused_with_its_folder(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TeacherError, match=r"teacher of mine has a truncated or damaged safetensors file"):
        read_model(folder, read_config(folder), dtype=torch.float32, device=CPU)


def test_weight_left_to_chance_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 weights are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": TopkParams(k=VOCABULARY + 1, max_length=8)}, r"topk\.k is 201: .* has a vocabulary of 200"),
        ({"topk": TopkParams(k=0, max_length=8)}, r"topk\.k is 0"),
        ({"hidden_states": HiddenStateParams(blocks=(0, 3), max_length=8)}, r"blocks has 3: .* has blocks 0 to 2"),
        ({"hidden_states": HiddenStateParams(blocks=(-1,), max_length=8)}, r"blocks has -1"),
        ({"hidden_states": HiddenStateParams(blocks=(), max_length=8)}, r"blocks is empty"),
        ({"topk": None, "hidden_states": None, "embeddings": None}, r"keeps no cache"),
    ],
)
def test_impossible_recipe_is_refused_before_the_weights_are_read(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    params = tiny_params(folder, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=message):
        load_teacher(params, digests=None, warn=no_warning)


def test_model_that_sees_the_future_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + output.mean(dim=1, keepdim=True))
    with pytest.raises(TeacherError, match="not causal"):
        as_teacher(model, device=CPU)


def test_rotary_embeddings_that_depend_on_the_length_are_known() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert rotary_limit(tiny_config("llama", rope_parameters=dynamic), "dynamic") == 256
    assert rotary_limit(tiny_config("llama", rope_parameters=dynamic), "longrope") is None
    assert rotary_limit(tiny_config("llama", rope_parameters=LONGROPE), "longrope") == 32
    assert rotary_limit(tiny_config("llama"), "longrope") is None
    assert rotary_limit(tiny_config("gemma3"), "longrope") is None
