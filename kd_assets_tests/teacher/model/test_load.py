"""Loading: what is refused, before and after the weights are read, and what the message says to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_assets.contract import HiddenStateParams, TopkParams
from kd_assets.errors import InputError, MissingInputError, RecipeError, TeacherChangedError, TeacherError
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


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_biases_that_the_configuration_forgot_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "biased", "llama", attention_bias=True)
    change_weights(folder, lambda w: w.update({k: v + 1 for k, v in w.items() if k.endswith("_proj.bias")}))
    load_teacher(tiny_params(folder), digests=None, warn=no_warning)
    change_config(folder, attention_bias=False)
    with pytest.raises(
        TeacherError, match=r"no place for 12 of the weights .*model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_biases_of_zero_change_nothing_and_are_counted(folder: Path) -> None:
    """AutoGPTQ writes them for every linear layer."""
    zeros = {f"model.layers.{n}.self_attn.q_proj.bias": torch.zeros(HIDDEN_SIZE) for n in range(N_BLOCKS)}
    change_weights(folder, lambda w: w.update(zeros))
    teacher = load_teacher(tiny_params(folder), digests=None, warn=no_warning)
    assert teacher.unused_weights == {"biases of zero": N_BLOCKS}
    change_weights(folder, lambda w: w["model.layers.1.self_attn.q_proj.bias"].fill_(1e-3))
    with pytest.raises(TeacherError, match=r"no place for 1 of the weights"):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_layers_that_the_configuration_does_not_count_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(TeacherError, match=r"no place for 9 of the weights .*model\.layers\.2\."):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_a_layer_too_many_is_no_prediction_layer_because_the_configuration_counts_one(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    with pytest.raises(TeacherError, match=r"no place for 9 of the weights"):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_layers_that_predict_further_tokens_are_passed_over_and_counted(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    change_weights(folder, lambda w: w.update({"model.layers.2.eh_proj.weight": torch.ones(HIDDEN_SIZE, 64)}))
    teacher = load_teacher(tiny_params(folder), digests=None, warn=no_warning)
    assert teacher.unused_weights == {"multi-token prediction": 10}


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "rotary buffers"),
        ("model.position_ids", (1, 8), "position ids"),
        ("mtp.layers.0.mlp.up_proj.weight", (4, 4), "multi-token prediction"),
        ("vision_tower.blocks.0.weight", (4, 4), "other modalities"),
        ("model.layers.0.self_attn.k_proj.k_scale", (1,), "scales of a quantised key-value cache"),
        ("model.layers.0.self_attn.v_cache_scale", (1,), "scales of a quantised key-value cache"),
        ("model.layers.0.attn.bias", (1, 1, 8, 8), "attention masks"),
        ("v_head.summary.weight", (1, 4), "value head"),
    ],
)
def test_weights_known_to_be_harmless_are_counted_by_kind(
    folder: Path, name: str, shape: tuple[int, ...], kind: str
) -> None:
    change_weights(folder, lambda w: w.update({name: torch.ones(shape)}))
    teacher = load_teacher(tiny_params(folder), digests=None, warn=no_warning)
    assert teacher.unused_weights == {kind: 1}


def test_what_transformers_leaves_out_by_itself_is_counted_too(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "gpt2", "gpt2")
    change_weights(folder, lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    assert load_teacher(tiny_params(folder), digests=None, warn=no_warning).unused_weights == {"attention masks": 1}


def test_weights_of_another_shape_are_refused_with_both_shapes(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    with pytest.raises(
        TeacherError, match=r"9 weights are mismatched.*\[32, 48\] in its file and \[32, 40\] by config"
    ):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_a_table_of_positions_is_no_longer_than_the_weights(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "gpt2", "gpt2", max_position_embeddings=256)
    change_config(folder, n_positions=10**9, max_position_embeddings=10**9)
    with pytest.raises(TeacherError, match=r"says max_position_embeddings 1,000,000,000, and the widest"):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


def test_positions_that_are_computed_may_be_many(folder: Path) -> None:
    change_config(folder, max_position_embeddings=10**9)
    load_teacher(tiny_params(folder), digests=None, warn=no_warning)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_nested_without_end_is_refused(folder: Path, name: str) -> None:
    params = tiny_params(folder)
    depth = sys.getrecursionlimit()  # some libraries raise it
    (folder / name).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises((InputError, TeacherError)):
        load_teacher(params, digests=None, warn=no_warning)


def test_two_files_with_one_weight_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    one = {"model.norm.weight": weights["model.norm.weight"] + 1}
    save_file(one, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(TeacherError, match=r"both hold model\.norm\.weight"):
        load_teacher(tiny_params(folder), digests=None, warn=no_warning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, r"says hidden_size 1,000,000,000, and the widest of its weights has 200"),
        ({"hidden_size": -4}, r"says hidden_size -4"),
        ({"vocab_size": 10**9}, r"says vocab_size 1,000,000,000"),
        ({"num_hidden_layers": 10**9}, r"says num_hidden_layers 1,000,000,000, and its files hold 30 weights"),
        ({"intermediate_size": 10**9}, r"says intermediate_size 1,000,000,000, and the widest of its weights has 200"),
        ({"head_dim": 10**9}, r"says head_dim 1,000,000,000"),
        ({"hidden_size": "abc"}, r"holds no configuration of a model"),
        ({"hidden_size": [1]}, r"holds no configuration of a model"),
        ({"num_attention_heads": 0}, r"holds no configuration of a model|no model can be made of config\.json"),
        ({"num_attention_heads": 10**9}, r"holds no configuration of a model|says num_attention_heads 1,000,000,000"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_memory_is_taken_for_them(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises((TeacherError, MissingInputError), match=message):
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
