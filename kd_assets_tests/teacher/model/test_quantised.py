"""Quantised teachers: what is recorded of them, what is refused, and caches by real ones where torchao is there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd_assets.contract import EmbeddingParams, HiddenStateParams, TopkParams
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.store import read_manifest
from kd_assets.teacher.model.head import is_plain
from kd_assets.teacher.model.load import load_teacher
from kd_assets.teacher.model.quantised import ACTIVATION_RTOL, described, tolerance
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_config, tiny_documents, tiny_model, tiny_params

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def torchao(name: str, **data: Any) -> dict[str, Any]:
    """The settings of a recipe, as `TorchAoConfig(...).to_dict()` gives them."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


INT8_WEIGHTS = torchao("Int8WeightOnlyConfig")
INT8_DYNAMIC = torchao("Int8DynamicActivationInt8WeightConfig")
PER_TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
WITHOUT_MIXED_BATCHES = torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[PER_ROW, PER_ROW])
WITH_MIXED_BATCHES = torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[PER_TENSOR, PER_TENSOR])


@pytest.mark.parametrize(
    ("settings", "expected", "activations"),
    [
        (INT8_WEIGHTS, "torchao int8 weight only", "plain"),
        (torchao("Int4WeightOnlyConfig", group_size=128), "torchao int4 weight only", "plain"),
        (INT8_DYNAMIC, "torchao int8 dynamic activation int8 weight", "by_token"),
        (torchao("Int8StaticActivationInt8WeightConfig"), "torchao int8 static activation int8 weight", "static"),
        (WITHOUT_MIXED_BATCHES, "torchao float8 dynamic activation float8 weight", "by_token"),
        (WITH_MIXED_BATCHES, "torchao float8 dynamic activation float8 weight", "by_batch"),
        (
            {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes 4 bit nf4 weight only",
            "plain",
        ),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes int8", "by_batch"),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "bitsandbytes int8", "by_token"),
        ({"quant_method": "fp8"}, "fp8 weights in blocks, dynamic activations", "by_token"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8", "by_token"),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4 bit weight only", "plain"),
        ({"quant_method": "mxfp4"}, "mxfp4 weight only", "plain"),
        ({"quant_method": "nvfp4"}, "nvfp4", "unknown"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None}},
            },
            "compressed-tensors pack-quantized 4 bit weight only",
            "plain",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8}, "input_activations": {"dynamic": True, "strategy": "token"}}
                },
            },
            "compressed-tensors float-quantized 8 bit, dynamic activations",
            "by_token",
        ),
    ],
)
def test_a_quantisation_is_named_in_words(settings: dict[str, Any], expected: str, activations: str) -> None:
    found = described(settings)
    assert (str(found), found.activations) == (expected, activations)


def test_only_rounded_activations_widen_a_tolerance() -> None:
    assert tolerance(2.0**-15, None) == tolerance(2.0**-15, described(INT8_WEIGHTS)) == 2.0**-15
    assert tolerance(2.0**-15, described(INT8_DYNAMIC)) == ACTIVATION_RTOL
    assert tolerance(2.0**-15, described(INT8_DYNAMIC, dequantised=True)) == 2.0**-15


def test_a_quantisation_that_transformers_does_not_know_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    params = tiny_params(folder, quantization={"quant_method": "magic"})
    with pytest.raises(RecipeError, match=r"teacher\.quantization .*ValueError: Unknown quantization type, got magic"):
        load_teacher(params, digests=None, warn=print)


def test_a_quantised_checkpoint_of_an_unknown_method_is_refused_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "magic"}}))
    with pytest.raises(RecipeError, match=r"the checkpoint's quantisation .* got magic"):
        load_teacher(tiny_params(folder), digests=None, warn=print)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq", "nbits": 4}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        (INT8_WEIGHTS, "torchao"),
    ],
)
def test_a_missing_package_is_named_before_the_weights_are_read(
    tmp_path: Path, settings: dict[str, Any], package: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    folder = save_teacher(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(MissingInputError, match=f"needs what this machine does not have: .*{package}"):
        load_teacher(tiny_params(folder, quantization=settings), digests=None, warn=print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_quantisation_that_needs_a_gpu_says_so(tmp_path: Path) -> None:
    params = tiny_params(save_teacher(tmp_path / "model"), quantization={"quant_method": "fp8"})
    with pytest.raises(MissingInputError, match="A GPU or XPU is needed for FP8 quantization"):
        load_teacher(params, digests=None, warn=print)


def save_fp8_checkpoint(folder: Path) -> Path:
    """A Llama whose matrices are float8 in blocks of 16, as DeepSeek's checkpoints have them."""
    model = tiny_model("llama")
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.ndim == 2 and ".layers." in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // 16, 16, columns // 16, 16)
            scales = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448.0
            tensors[name] = (blocks / scales).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales.reshape(rows // 16, columns // 16)
        else:
            tensors[name] = weight.contiguous()
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    config = tiny_config("llama", architectures=["LlamaForCausalLM"], quantization_config=quantization)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it in float8")
def test_a_float8_checkpoint_is_widened_where_there_is_no_kernel_and_recorded_so(tmp_path: Path) -> None:
    folder = save_fp8_checkpoint(tmp_path / "fp8")
    teacher = load_teacher(tiny_params(folder), digests=None, warn=print)
    assert str(teacher.quantisation) == "fp8 weights in blocks, dynamic activations, dequantised on loading"
    assert teacher.dtype == torch.float32
    plain = tiny_model("llama").model.layers[0].mlp.up_proj.weight
    widened = teacher.model.model.layers[0].mlp.up_proj.weight
    assert 0 < (widened - plain).norm() / plain.norm() < 0.05


def test_a_recipe_that_asks_for_another_quantisation_than_the_checkpoint_has_is_refused(tmp_path: Path) -> None:
    params = tiny_params(save_fp8_checkpoint(tmp_path / "fp8"), quantization=INT8_WEIGHTS)
    with pytest.raises(
        RecipeError, match=r"\(torchao int8 weight only\), and the checkpoint is quantised already \(fp8"
    ):
        load_teacher(params, digests=None, warn=print)


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [INT8_WEIGHTS, INT8_DYNAMIC, torchao("Float8WeightOnlyConfig")])
def test_caches_of_a_teacher_quantised_on_loading_pass_their_recomputation(
    tmp_path: Path, settings: dict[str, Any], dtype: str
) -> None:
    folder = save_teacher(tmp_path / "model")
    desk = Desk(tmp_path)
    shard_folder = desk.commit_shard(tiny_documents([30, 12, 1, 50, 7, 41, 22]))
    hidden = HiddenStateParams(blocks=(1,), max_length=64, final=("before_norm", "after_norm"))
    params = tiny_params(folder, quantization=settings, dtype=dtype, hidden_states=hidden)
    unit = desk.unit(shard_folder, params)
    desk.run(params, unit)
    (loaded,) = desk.events("teacher_loaded")
    expected = str(described(settings))
    assert loaded["quantization"] == expected
    for output in unit.outputs:
        manifest = read_manifest(Path(output.path))
        assert manifest.checks["recomputed"]["passed"], manifest.checks["recomputed"]
        if output.asset == "hidden_state_cache":
            assert manifest.checks["rebuilt"]["passed"], manifest.checks["rebuilt"]
        assert (manifest.provenance["quantization"], manifest.facts["quantization"]) == (expected, expected)


@needs_torchao
def test_a_quantised_teacher_gives_other_numbers_than_the_plain_one(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model")
    plain = load_teacher(tiny_params(folder), digests=None, warn=print)
    quantised = load_teacher(tiny_params(folder, quantization=INT8_WEIGHTS), digests=None, warn=print)
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        theirs, ours = plain.model(ids).logits, quantised.model(ids).logits
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.2
    assert (plain.quantisation, quantised.dtype) == (None, torch.float32)


@needs_torchao
def test_a_quantised_head_is_called_not_multiplied_with(tmp_path: Path) -> None:
    settings = {**INT8_WEIGHTS, "include_input_output_embeddings": True}
    warnings: list[str] = []
    folder = save_teacher(tmp_path / "model")
    teacher = load_teacher(tiny_params(folder, quantization=settings), digests=None, warn=warnings.append)
    assert teacher.head is not None
    assert not is_plain(teacher.head.linear)
    assert warnings == []


@needs_torchao
def test_a_checkpoint_that_was_saved_quantised_is_used_as_it_is(tmp_path: Path) -> None:
    folder, saved = save_teacher(tmp_path / "model"), tmp_path / "saved"
    made = load_teacher(tiny_params(folder, quantization=INT8_WEIGHTS), digests=None, warn=print)
    made.model.save_pretrained(saved)
    loaded = load_teacher(tiny_params(saved), digests=None, warn=print)
    assert str(loaded.quantisation) == "torchao int8 weight only"
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        np.testing.assert_array_equal(loaded.model(ids).logits, made.model(ids).logits)
    assert weights_fingerprint(saved, None) != weights_fingerprint(folder, None)


@needs_torchao
def test_a_teacher_whose_scales_are_of_the_batch_runs_every_document_alone(tmp_path: Path) -> None:
    """Its neighbours change a document's numbers: alone, it gives the same whatever the batch would have been."""
    settings = torchao("Int8DynamicActivationInt8WeightConfig", granularity=PER_TENSOR)
    desk = Desk(tmp_path)
    shard_folder = desk.commit_shard(tiny_documents([30, 12, 50]))
    params = tiny_params(
        save_teacher(tmp_path / "model"),
        quantization=settings,
        topk=TopkParams(k=4, max_length=64),
        hidden_states=HiddenStateParams(blocks=(0,), max_length=64),
        embeddings=EmbeddingParams(max_length=64),
    )
    facts = desk.run(params, desk.unit(shard_folder, params))
    assert facts["n_batches"] == 3
    (warning,) = desk.events("warning")
    assert "every document runs by itself" in warning["message"]
