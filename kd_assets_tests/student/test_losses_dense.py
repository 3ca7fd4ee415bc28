"""Every loss on logits against its dense reference: value and gradient, also where they are hard to compute."""

from __future__ import annotations

import math

import pytest
import torch

from kd_assets.student.losses import logprobs
from kd_assets_tests.student.dense import NAMES, VOCABULARY, Case, found_and_expected, pairs, value_and_gradient


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_dense_reference(name: str, k: int, temperature: float) -> None:
    found, expected = found_and_expected(name, Case.random(k), temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_a_row_or_two_give_what_one_run_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.random(4)
    in_one, _ = found_and_expected(name, case)
    for elements in (1, 2 * VOCABULARY):
        monkeypatch.setitem(logprobs.RUN_ELEMENTS, "cpu", elements)
        in_runs, _ = found_and_expected(name, case)
        assert torch.equal(in_runs[0], in_one[0])
        assert torch.equal(in_runs[1], in_one[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_reduced_in_float32(name: str, dtype: torch.dtype) -> None:
    case = Case.random(4, dtype=dtype)
    (value, gradient), (expected, expected_gradient) = found_and_expected(name, case, 2.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-6), "of these logits, not of rounded ones"
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_give_finite_values_and_gradients(name: str) -> None:
    case = Case.random(4, spread=1.0)
    student = (case.student * 300).float()  # differences that exp does not survive
    loss, _ = pairs(2.0)[name]
    value, gradient = value_and_gradient(lambda s: loss(case, s), student)
    assert value.isfinite()
    assert value > 0
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_large_differences_are_those_of_the_dense_reference(name: str) -> None:
    found, expected = found_and_expected(name, Case.random(4, spread=8.0))
    # The teacher's rest is given 1e-6 at least, where a teacher of 8 leaves less: this compares the others.
    assert (1 - Case.random(4, spread=8.0).top[1].exp().sum(-1))[Case.random(4).mask].min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_an_offset_of_all_logits_changes_nothing(name: str) -> None:
    case = Case.random(4)
    loss, _ = pairs(2.0)[name]
    torch.testing.assert_close(loss(case, case.student + 50.0), loss(case, case.student))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_leaves_out_has_no_influence_even_where_it_is_no_number(name: str) -> None:
    case = Case.random(4)
    loss, _ = pairs(1.0)[name]
    spoilt = case.student.masked_fill(~case.mask[..., None], math.nan)
    (value, gradient), (expected, expected_gradient) = (
        value_and_gradient(lambda s: loss(case, s), student) for student in (spoilt, case.student)
    )
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert not gradient[~case.mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_gives_zero_and_a_gradient_of_zeros(name: str) -> None:
    case = Case.random(4)
    case.mask.zero_()
    loss, _ = pairs(1.0)[name]
    student = case.student.clone()
    student[0, 0, 0] = math.inf
    value, gradient = value_and_gradient(lambda s: loss(case, s), student)
    assert value.item() == 0.0
    assert gradient.shape == student.shape
    assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    case = Case.random(3)
    loss, _ = pairs(1.7)[name]
    student = case.student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(case, s), (student,))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_picked_before_give_the_same(name: str) -> None:
    # A trainer that computes logits of the asked rows alone has one dimension of positions.
    case = Case.random(4)
    loss, _ = pairs(1.0)[name]
    picked = Case(
        student=case.student[case.mask],
        teacher=case.teacher[case.mask],
        k=case.k,
        mask=torch.ones(int(case.mask.sum()), dtype=torch.bool),
        targets=case.targets[case.mask],
        sampled_ids=case.sampled_ids[case.mask],
        sampled_counts=case.sampled_counts[case.mask],
    )
    torch.testing.assert_close(loss(picked, picked.student), loss(case, case.student))


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_not_shifted_are_refused(name: str) -> None:
    case = Case.random(4)
    loss, _ = pairs(1.0)[name]
    one_more = torch.cat([case.student, case.student[:, :1]], dim=1)
    with pytest.raises(ValueError, match=r"\(2, 5\) positions.*student.*\(2, 6, 11\).*logits\[:, :-1\]"):
        loss(case, one_more)
