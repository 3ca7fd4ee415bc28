"""Losses on hidden states and embeddings against dense references in float64, and the projector on a real model."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kd_assets.student.losses import (
    Projector,
    feature_cosine_loss,
    feature_mse_loss,
    relation_angle_loss,
    relation_distance_loss,
)
from kd_assets_tests.student.dense import value_and_gradient


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PROJECTED, HIDDEN = random(2, 5, 8), random(2, 5, 8, seed=1)
MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])


def huber(x: Tensor) -> Tensor:
    """Park et al. 2019, equation 3."""
    return torch.where(x.abs() <= 1, x**2 / 2, x.abs() - 0.5)


def dense_mse(projected: Tensor) -> Tensor:
    return torch.stack([((projected[b, t] - HIDDEN[b, t]) ** 2).mean() for b, t in MASK.nonzero().tolist()]).mean()


def dense_cosine(projected: Tensor) -> Tensor:
    rows = [(projected[b, t], HIDDEN[b, t]) for b, t in MASK.nonzero().tolist()]
    return torch.stack([1 - x @ y / (x @ x).sqrt() / (y @ y).sqrt() for x, y in rows]).mean()


def dense_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(points: Tensor) -> Tensor:
        pairs = itertools.permutations(range(len(points)), 2)
        distances = torch.stack([((points[i] - points[j]) ** 2).sum().sqrt() for i, j in pairs])
        return distances / distances.mean()

    return huber(relative(student) - relative(teacher)).mean()


def dense_angle(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(points: Tensor) -> Tensor:
        found = []
        for i, j, k in itertools.permutations(range(len(points)), 3):
            x, y = points[i] - points[j], points[k] - points[j]
            found.append(x @ y / (x @ x).sqrt() / (y @ y).sqrt())
        return torch.stack(found)

    return huber(cosines(student) - cosines(teacher)).mean()


def test_feature_losses_have_value_and_gradient_of_the_dense_reference() -> None:
    for loss, dense in ((feature_mse_loss, dense_mse), (feature_cosine_loss, dense_cosine)):
        found = value_and_gradient(partial(loss, hidden_BTH=HIDDEN, mask_BT=MASK), PROJECTED)
        torch.testing.assert_close(found, value_and_gradient(dense, PROJECTED))


@pytest.mark.parametrize("n_documents", [2, 3, 6])
def test_relation_losses_have_value_and_gradient_of_the_dense_reference(n_documents: int) -> None:
    student, teacher = random(n_documents, 4), random(n_documents, 9, seed=1)
    pairs = [(relation_distance_loss, dense_distance)]
    if n_documents > 2:
        pairs.append((relation_angle_loss, dense_angle))
    for loss, dense in pairs:
        found = value_and_gradient(partial(loss, teacher_MH=teacher), student)
        expected = value_and_gradient(partial(dense, teacher=teacher), student)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_gradcheck() -> None:
    x, teacher = random(5, 4).requires_grad_(), random(5, 9, seed=1)
    for relation in (relation_distance_loss, relation_angle_loss):
        assert torch.autograd.gradcheck(partial(relation, teacher_MH=teacher), (x,))
    projected = PROJECTED.clone().requires_grad_()
    for feature in (feature_mse_loss, feature_cosine_loss):
        assert torch.autograd.gradcheck(partial(feature, hidden_BTH=HIDDEN, mask_BT=MASK), (projected,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_compared_in_float32(dtype: torch.dtype) -> None:
    projected, hidden = PROJECTED.to(dtype), HIDDEN.bfloat16()
    for loss in (feature_mse_loss, feature_cosine_loss):
        value, gradient = value_and_gradient(partial(loss, hidden_BTH=hidden, mask_BT=MASK), projected)
        assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
        assert value.item() == pytest.approx(loss(projected.double(), hidden, MASK).item(), rel=1e-5)


def test_what_the_mask_leaves_out_has_no_influence_even_where_it_is_no_number() -> None:
    spoilt = PROJECTED.masked_fill(~MASK[..., None], math.nan)
    for loss in (feature_mse_loss, feature_cosine_loss):
        assert loss(spoilt, HIDDEN, MASK) == loss(PROJECTED, HIDDEN, MASK)
        nothing, gradient = value_and_gradient(partial(loss, hidden_BTH=HIDDEN, mask_BT=MASK & False), spoilt)
        assert nothing == 0.0
        assert not gradient.any()


def test_states_that_are_shifted_as_logits_are_refused() -> None:
    for loss in (feature_mse_loss, feature_cosine_loss):
        with pytest.raises(ValueError, match=r"student.*\(2, 4, 8\): give states of all tokens with hidden_mask"):
            loss(PROJECTED[:, :-1], HIDDEN, MASK)


def tiny_student() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    ).eval()


def test_the_projector_maps_the_output_of_a_layer_to_its_block() -> None:
    student, ids = tiny_student(), torch.randint(0, 20, (2, 5))
    outputs: dict[int, Tensor] = {}
    for n, layer in enumerate(student.model.layers):
        layer.register_forward_hook(lambda _, __, output, n=n: outputs.update({n: output}))
    states = student(input_ids=ids, output_hidden_states=True).hidden_states
    layers = {"hidden_block_4": 0, "hidden_block_9": 1, "hidden_block_11": 2}
    projector = Projector(layers, student_hidden_size=16, teacher_hidden_size=24)
    projected = projector(states)
    assert list(projected) == list(layers)
    for name, layer in layers.items():
        # The last one has been through the final norm, as transformers gives it.
        of_layer = student.model.norm(outputs[layer]) if layer == 2 else outputs[layer]
        torch.testing.assert_close(projected[name], projector.maps[name](of_layer))
        assert projected[name].shape == (2, 5, 24)


def test_the_projector_learns_with_the_student() -> None:
    student, ids = tiny_student(), torch.randint(0, 20, (2, 5))
    projector = Projector({"hidden_block_4": 1}, student_hidden_size=16, teacher_hidden_size=8)
    optimizer = torch.optim.Adam([*student.parameters(), *projector.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        states = student(input_ids=ids, output_hidden_states=True).hidden_states
        loss = feature_mse_loss(projector(states)["hidden_block_4"], HIDDEN, MASK)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0, "layers below the mapped one learn"
    assert student.model.layers[2].mlp.up_proj.weight.grad is None, "the one above does not"


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer -1 for hidden_block_4: layers are counted from 0"):
        Projector({"hidden_block_4": -1}, student_hidden_size=16, teacher_hidden_size=8)
    states = tiny_student()(input_ids=torch.zeros(1, 3, dtype=torch.int64), output_hidden_states=True).hidden_states
    projector = Projector({"hidden_block_4": 3}, student_hidden_size=16, teacher_hidden_size=8)
    with pytest.raises(ValueError, match=r"layer 3 for hidden_block_4: the student has layers 0 to 2"):
        projector(states)
