"""The head in chunks: the model's own logits, or no head at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_assets.teacher.model.head import (
    ChunkBuffers,
    Head,
    chunk_rows,
    configured_head,
    proven_head,
    relative_difference,
)
from kd_assets_tests.teacher.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")


def probe(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states [B, T, H] and the model's own logits [B, T, V]."""
    ids_BT = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        output = model(input_ids=ids_BT, output_hidden_states=True)
    return output.hidden_states[-1], output.logits


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, {}),
        ("phi", {}, {}),
        ("gemma2", {}, {"softcap": 5.0}),
        ("granite", {}, {"divisor": 4.0}),
        ("cohere", {}, {"multiplier": 0.25}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configured_head_is_proven_on_the_weights(
    architecture: str, changes: dict[str, object], expected: dict[str, float], dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, dtype=dtype, **changes)
    head = configured_head(model, model.config)
    proven, difference = proven_head(head, *probe(model))
    assert proven is head
    assert difference <= 2**-8
    for name in ("divisor", "multiplier", "softcap"):
        assert getattr(head, name) == expected.get(name)


def test_phi_has_a_bias_and_it_counts() -> None:
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    head = configured_head(model, model.config)
    assert proven_head(head, *probe(model))[0] is head


@pytest.mark.parametrize(
    "wrong", [{"divisor": 2.0}, {"multiplier": 1.01}, {"softcap": 30.0}], ids=["divisor", "multiplier", "softcap"]
)
def test_head_that_differs_from_the_model_is_not_proven(wrong: dict[str, float]) -> None:
    model = tiny_model("llama")
    proven, difference = proven_head(Head(linear=model.lm_head, **wrong), *probe(model))
    assert proven is None
    assert difference > 1e-3


def test_head_of_another_vocabulary_is_not_proven() -> None:
    model = tiny_model("llama")
    assert proven_head(Head(linear=nn.Linear(32, VOCABULARY + 8)), *probe(model)) == (None, float("inf"))
    assert proven_head(None, *probe(model)) == (None, float("inf"))


def test_broken_weights_do_not_disprove_a_head() -> None:
    """The pass then names the document, which says more than a warning about the head."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    head = configured_head(model, model.config)
    assert proven_head(head, *probe(model))[0] is head


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_number_on_one_side_alone_is_an_infinite_difference(broken: float) -> None:
    """Every bound then refuses it, whichever way round it is compared."""
    whole, damaged = torch.ones(4), torch.tensor([1.0, broken, 1.0, 1.0])
    assert relative_difference(damaged, whole) == float("inf")
    assert relative_difference(whole, damaged) == float("inf")
    assert relative_difference(damaged, damaged) == 0.0


def test_logits_of_16_bit_teachers_are_the_models_own_in_its_precision() -> None:
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    final_BTH, logits_BTV = probe(model)
    head = configured_head(model, model.config)
    assert head is not None
    buffers = ChunkBuffers(vocabulary_size=VOCABULARY, dtype=torch.bfloat16, device=CPU)
    with torch.inference_mode():
        logits_NV = head.logits(final_BTH.flatten(0, 1), buffers)
    assert logits_NV.dtype == torch.bfloat16
    assert torch.equal(logits_NV, logits_BTV.flatten(0, 1))


def test_chunks_shrink_as_the_vocabulary_grows() -> None:
    assert chunk_rows(32_768, torch.float32, CPU) == 1024
    assert chunk_rows(131_072, torch.float32, CPU) == 256
    assert chunk_rows(10**9, torch.float32, CPU) == 16


def test_a_chunk_on_a_gpu_takes_half_a_gib_in_the_models_own_precision() -> None:
    cuda = torch.device("cuda")
    assert chunk_rows(131_072, torch.bfloat16, cuda) == 2048
    assert chunk_rows(131_072, torch.float32, cuda) == 1024
    assert chunk_rows(128_256, torch.bfloat16, cuda) == 2092
