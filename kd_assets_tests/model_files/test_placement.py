"""How teachers lie on GPUs: a table of nodes and teachers, and what a folder of weights tells."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from kd_assets.errors import InputError, MissingInputError, RecipeError
from kd_assets.model_files.placement import Placement, place
from kd_assets.model_files.size import GIB, TeacherSize, quantised_bits, teacher_size

LLAMA_70B_DIVISORS = (8, 64, 28672, 128256)


def a_size(weights_gib: float = 131.4, **changes: Any) -> TeacherSize:
    facts = {"precision": "bfloat16", "model_type": "llama", "divisors": LLAMA_70B_DIVISORS, "has_plan": True}
    return TeacherSize(weights_gib=weights_gib, **{**facts, **changes})


def task_resources(size: TeacherSize, n_gpus: int, gpu_memory_gib: float | None, **wanted: Any) -> Placement:
    placement = place(size, n_gpus=n_gpus, gpu_memory_gib=gpu_memory_gib, **wanted)
    assert placement is not None
    return placement


@pytest.mark.parametrize(
    ("weights_gib", "n_gpus", "gpu_memory_gib", "expected"),
    [
        (15.0, 1, 80, ("one_device", 1, 1)),
        (15.0, 4, 80, ("one_device", 1, 4)),
        (15.0, 8, 24, ("one_device", 1, 8)),
        (15.0, 2, 16, ("tensor_parallel", 2, 1)),
        (61.0, 4, 80, ("one_device", 1, 4)),
        (75.0, 4, 80, ("tensor_parallel", 2, 2)),
        (131.4, 4, 80, ("tensor_parallel", 2, 2)),
        (131.4, 4, 64, ("tensor_parallel", 4, 1)),
        (131.4, 8, 40, ("tensor_parallel", 4, 2)),
        (131.4, 1, 139.8, ("one_device", 1, 1)),
        (131.4, 8, 139.8, ("one_device", 1, 8)),
        (131.4, 6, 32, ("device_map", 6, 1)),
        (756.0, 8, 139.8, ("tensor_parallel", 8, 1)),
    ],
)
def test_as_few_gpus_as_hold_the_teacher_and_as_many_processes_as_that_leaves(
    weights_gib: float, n_gpus: int, gpu_memory_gib: float, expected: tuple[str, int, int]
) -> None:
    placement = task_resources(a_size(weights_gib), n_gpus, gpu_memory_gib)
    assert (placement.kind, placement.n_devices, placement.n_processes) == expected
    assert placement.n_processes * placement.n_devices <= n_gpus


def test_the_answer_says_its_reason_in_one_line() -> None:
    assert task_resources(a_size(), 4, 80).in_words == (
        "131.4 GiB of weights in bfloat16 fit 2 GPUs of 80 GiB with room for a batch: tensor parallel over 2, 2 "
        "processes a task"
    )
    assert task_resources(a_size(has_plan=False), 2, 80).in_words == (
        "131.4 GiB of weights in bfloat16 fit 2 GPUs of 80 GiB with room for a batch; layer by layer, since "
        "transformers has no tensor-parallel plan for llama: layer by layer over 2, 1 process a task"
    )
    assert "need more than 2 GPUs of 40 GiB: expect to run out of memory" in task_resources(a_size(), 2, 40).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_plan": False}, "no tensor-parallel plan"),
        ({"divisors": (5, 40, 32000)}, "its sizes 5 do not divide by 2"),
        ({"divisors": ()}, "does not say how many heads"),
        ({"is_quantised": True}, "quantised weights"),
    ],
)
def test_what_cannot_be_split_goes_layer_by_layer_and_says_why(changes: dict[str, Any], reason: str) -> None:
    placement = task_resources(a_size(**changes), 2, 80)
    assert (placement.kind, placement.n_devices) == ("device_map", 2)
    assert reason in placement.reason


def test_more_gpus_are_taken_where_fewer_cannot_be_split_over() -> None:
    sizes_of_three = a_size(60.0, divisors=(6, 24, 30000))
    assert task_resources(sizes_of_three, 6, 40).n_devices == 2
    assert task_resources(a_size(60.0, divisors=(3, 24, 30000)), 6, 40).n_devices == 3


def test_a_recipe_overrides_what_would_be_chosen() -> None:
    small = a_size(15.0)
    assert task_resources(small, 4, 80, wanted="tensor_parallel").n_devices == 2
    assert task_resources(small, 4, 80, wanted="tensor_parallel", n_devices=4).n_processes == 1
    assert task_resources(small, 4, None, wanted="tensor_parallel", n_devices=4).kind == "tensor_parallel"
    assert task_resources(small, 4, 80, wanted="device_map", n_devices=2).in_words.endswith(
        "layer by layer over 2, 2 processes a task"
    )
    assert task_resources(small, 4, 80, n_devices=2).kind == "tensor_parallel"
    assert task_resources(a_size(), 4, 80, wanted="one_device").n_processes == 4
    assert task_resources(a_size(), 4, 80, n_devices=1).kind == "one_device"
    assert task_resources(a_size(is_quantised=True), 4, 80, wanted="tensor_parallel").kind == "tensor_parallel"


def test_processes_that_are_settled_share_the_gpus_equally() -> None:
    four_each = task_resources(a_size(200.0), 8, 80, n_processes=2)
    assert (four_each.kind, four_each.n_devices, four_each.n_processes) == ("tensor_parallel", 4, 2)
    assert task_resources(a_size(15.0), 8, 80, n_processes=2).n_devices == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"n_devices": 8}, "n_devices is 8, and a process has 4 GPUs"),
        ({"n_devices": 4, "n_processes": 2}, r"a process has 2 GPUs \(4 on the node\)"),
        ({"wanted": "tensor_parallel", "n_devices": 3}, "sizes 8, 64, 28672 do not divide by 3"),
        ({"wanted": "tensor_parallel", "n_devices": 1}, "takes at least 2 GPUs"),
        ({"wanted": "one_device", "n_devices": 2}, "leave one out"),
        ({"wanted": "device_map", "n_processes": 4}, "a process has one GPU"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        place(a_size(), n_gpus=4, gpu_memory_gib=80, **wanted)


def test_only_the_node_can_tell_where_nobody_knows_the_memory() -> None:
    assert place(a_size(), n_gpus=4, gpu_memory_gib=None) is None
    assert place(a_size(), n_gpus=4, gpu_memory_gib=None, wanted="tensor_parallel") is None


def test_without_gpus_a_teacher_is_in_one_piece_unless_the_recipe_says_otherwise() -> None:
    on_cpu = {"n_gpus": 0, "gpu_memory_gib": None}
    assert task_resources(a_size(), **on_cpu).kind == "one_device"  # type: ignore[arg-type]
    assert task_resources(a_size(), **on_cpu, wanted="device_map").kind == "one_device"  # type: ignore[arg-type]
    split = task_resources(a_size(), **on_cpu, wanted="tensor_parallel", n_devices=4)  # type: ignore[arg-type]
    assert (split.kind, split.n_devices) == ("tensor_parallel", 4)


# ----------------------------------------------------------------------------------------------------- what it weighs


N_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def write_weights(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file whose numbers take no room on the disk: it is a hole."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * N_BYTES[dtype]
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """1 GiB of embeddings and head, and 4 GiB of other weights, in bfloat16, in two files."""
    config = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path / "model-00001-of-00002.safetensors", {"model.embed_tokens.weight": ("BF16", [GIB // 4])})
    blocks = {f"model.layers.{n}.mlp.up_proj.weight": ("BF16", [1024, 2 * 2**20 // 1024 * 512]) for n in range(2)}
    write_weights(tmp_path / "model-00002-of-00002.safetensors", {**blocks, "lm_head.weight": ("BF16", [GIB // 4])})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_weights_count_in_the_precision_they_run_in(folder: Path) -> None:
    assert teacher_size(folder, dtype="bfloat16").weights_gib == pytest.approx(5.0)
    assert teacher_size(folder, dtype="float32").weights_gib == pytest.approx(10.0)
    size = teacher_size(folder, dtype="bfloat16", has_plan=True)
    assert (size.model_type, size.divisors, size.has_plan) == ("llama", (8, 32, 128256), True)
    assert size.in_words == "5.0 GiB of weights in bfloat16"


def test_quantising_on_loading_leaves_embeddings_and_head_as_they_are(folder: Path) -> None:
    size = teacher_size(folder, dtype="bfloat16", quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert size.weights_gib == pytest.approx(1.0 + 4.0 * 4.5 / 16)
    assert (size.precision, size.is_quantised) == ("4.5-bit bfloat16", True)


def test_weights_that_are_stored_quantised_count_as_stored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    write_weights(folder / "model-00002-of-00002.safetensors", {"w": ("F8_E4M3", [GIB]), "w_scale": ("F32", [256])})
    size = teacher_size(folder, dtype="bfloat16")
    assert size.weights_gib == pytest.approx(1.5, rel=1e-3)
    assert size.is_quantised


def test_files_beside_the_weights_that_are_not_read_weigh_nothing(folder: Path) -> None:
    """Mistral's repositories hold the same weights again, as consolidated.safetensors."""
    write_weights(folder / "consolidated.safetensors", {"w": ("BF16", [GIB])})
    assert teacher_size(folder, dtype="bfloat16").weights_gib == pytest.approx(5.0)


def test_sizes_of_a_multimodal_model_are_those_of_its_text(folder: Path) -> None:
    text = {"num_attention_heads": 12, "num_key_value_heads": [4, 2], "vocab_size": 600, "intermediate_size": 0}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert teacher_size(folder, dtype="bfloat16").divisors == (2, 4, 12, 600)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
        ({"quant_method": "fp8"}, 8.0),
        ({"quant_method": "quanto", "weights": "int4"}, 4.5),
        ({"quant_method": "hqq", "nbits": 2}, 2.5),
        ({"quant_method": "something new"}, None),
    ],
)
def test_bits_of_a_weight_are_read_from_the_quantisation(quantization: dict[str, Any], bits: float | None) -> None:
    assert quantised_bits(quantization) == bits


def test_a_folder_without_weights_or_with_damaged_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"config\.json cannot be read"):
        teacher_size(tmp_path, dtype="bfloat16")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingInputError, match=r"holds no \*\.safetensors"):
        teacher_size(tmp_path, dtype="bfloat16")
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(InputError, match="no whole safetensors file"):
        teacher_size(tmp_path, dtype="bfloat16")
