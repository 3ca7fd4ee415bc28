"""A student with other ids than its teacher's head learns from a cache that is cut to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_assets.contract import PositionChoice, TokenIds
from kd_assets.student.dataset import TeacherCacheDataset, at_topk_positions, collate
from kd_assets.student.losses import (
    jensen_shannon_loss,
    renormalised_response_loss,
    response_loss,
    reverse_response_loss,
    sampled_response_loss,
)
from kd_assets_tests.student.made_up import (
    VOCABULARY,
    BigramTeacher,
    MadeUpDocument,
    commit_caches,
    made_up_documents,
)

N = VOCABULARY - 5
"""The ids that the student has."""
TEACHER = BigramTeacher()


def documents() -> list[MadeUpDocument]:
    return [
        MadeUpDocument(document_id=d.document_id, input_ids=tuple(i % N for i in d.input_ids), loss_mask=d.loss_mask)
        for d in made_up_documents(9)
    ]


def dataset(
    store: Path, *, positions: PositionChoice | None = None, max_length: int | None = None
) -> TeacherCacheDataset:
    folders = commit_caches(
        store,
        "shard-0",
        documents(),
        teacher=TEACHER,
        assets=("topk_cache",),
        draws=400,
        positions=positions or PositionChoice(),
        token_ids=TokenIds.below(N),
    )
    return TeacherCacheDataset.from_folders({"topk_cache": [folders["topk_cache"]]}, max_length=max_length)


def whole_logits(input_ids: Tensor) -> Tensor:
    return TEACHER.logits_VV[input_ids]


def test_samples_say_what_is_outside_of_the_students_ids(tmp_path: Path) -> None:
    found = dataset(tmp_path)
    for sample in (found[i] for i in range(len(found))):
        masses = whole_logits(sample["input_ids"][:-1]).softmax(-1)[:, N:].sum(-1)
        assert sample["outside_mass"].dtype == torch.float32
        torch.testing.assert_close(sample["outside_mass"], masses)
        assert sample["topk_ids"].numel() == 0 or int(sample["topk_ids"].max()) < N


def test_masses_are_padded_and_cut_with_the_rows_that_they_are_of(tmp_path: Path) -> None:
    learned = PositionChoice(kept="learned")
    for name, found, length in (
        ("all", dataset(tmp_path / "all"), None),
        ("cut", dataset(tmp_path / "cut", max_length=5), 5),
        ("some", dataset(tmp_path / "some", positions=learned, max_length=7), 7),
    ):
        samples = [found[i] for i in range(len(found))]
        batch = collate(samples)
        assert batch["outside_mass"].shape == batch["logsumexp"].shape, name
        for row, sample in zip(batch["outside_mass"], samples, strict=True):
            n = len(sample["logsumexp"])
            assert len(sample["outside_mass"]) == n
            assert torch.equal(row[:n], sample["outside_mass"])
            assert not row[n:].any()
            assert length is None or n < length


@pytest.mark.parametrize("positions", [PositionChoice(), PositionChoice(kept="learned")])
def test_the_teacher_over_the_students_ids_has_no_loss_and_a_shifted_one_has(
    tmp_path: Path, positions: PositionChoice
) -> None:
    found = dataset(tmp_path, positions=positions)
    batch = collate([found[i] for i in range(len(found))])
    logits_BTN = whole_logits(batch["input_ids"])[:, :-1, :N]
    asked = (batch["topk_ids"], batch["topk_logprobs"], batch["topk_mask"])
    right, wrong = (at_topk_positions(x, batch) for x in (logits_BTN, logits_BTN.roll(1, dims=1)))
    for loss in (response_loss, reverse_response_loss, jensen_shannon_loss):
        assert float(loss(right, *asked)) < 1e-5
        assert float(loss(wrong, *asked)) > 1e-2


def test_losses_are_those_of_the_dense_distribution_over_the_students_ids(tmp_path: Path) -> None:
    found = dataset(tmp_path)
    batch = collate([found[i] for i in range(len(found))])
    student_BTN = torch.randn(*batch["topk_ids"].shape[:2], N, generator=torch.Generator().manual_seed(2))
    teacher_BTN = whole_logits(batch["input_ids"])[:, :-1, :N]
    asked = (batch["topk_ids"], batch["topk_logprobs"], batch["topk_mask"])
    p_MN, q_MN = (x[batch["topk_mask"]].log_softmax(-1).double() for x in (teacher_BTN, student_BTN))
    ids_Mk = batch["topk_ids"][batch["topk_mask"]]
    p_Mk, q_Mk = p_MN.gather(1, ids_Mk), q_MN.gather(1, ids_Mk)
    tail_p, tail_q = (1 - x_Mk.exp().sum(1) for x_Mk in (p_Mk, q_Mk))
    bucket = ((p_Mk.exp() * (p_Mk - q_Mk)).sum(1) + tail_p * (tail_p / tail_q).log()).mean()
    assert float(response_loss(student_BTN, *asked)) == pytest.approx(float(bucket), rel=2e-3)
    kept_Mk = p_Mk.log_softmax(1)
    renormalised = (kept_Mk.exp() * (kept_Mk - q_Mk)).sum(1).mean()
    assert float(renormalised_response_loss(student_BTN, *asked)) == pytest.approx(float(renormalised), rel=2e-3)
    drawn = sampled_response_loss(student_BTN, batch["sampled_ids"], batch["sampled_counts"], batch["topk_mask"])
    entropy_MN = p_MN.exp() * (p_MN - q_MN)
    assert float(drawn) == pytest.approx(float(entropy_MN.sum(1).mean()), rel=0.3)
