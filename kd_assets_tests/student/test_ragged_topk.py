"""A student of a cache whose positions keep as many tokens as have a mass: samples, batches and losses, still exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets.store import Ragged
from kd_assets.student.dataset import TeacherCacheDataset, collate
from kd_assets.student.loading.batches import packed_batch, padded_batch
from kd_assets.student.losses import (
    jensen_shannon_loss,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    reverse_response_loss,
)
from kd_assets.student.losses.logprobs import chosen_logprobs
from kd_assets_tests.store import examples

PARAMS = {"k": examples.K, "max_length": examples.MAX_LENGTH, "top_p": 0.8}
EVERYWHERE = torch.tensor([[True]])
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "bucket": lambda z, ids, logprobs: response_loss(z, ids, logprobs, EVERYWHERE, temperature=2.0),
    "left_out": lambda z, ids, logprobs: response_loss(z, ids, logprobs, EVERYWHERE, tail="left_out"),
    "reverse": lambda z, ids, logprobs: reverse_response_loss(z, ids, logprobs, EVERYWHERE),
    "reverse_left_out": lambda z, ids, logprobs: reverse_response_loss(z, ids, logprobs, EVERYWHERE, tail="left_out"),
    "jensen_shannon": lambda z, ids, logprobs: jensen_shannon_loss(z, ids, logprobs, EVERYWHERE, beta=0.3),
    "renormalised": lambda z, ids, logprobs: renormalised_response_loss(z, ids, logprobs, EVERYWHERE, temperature=2.0),
    "target_kept": lambda z, ids, logprobs: rest_to_target_loss(z, ids, logprobs, ids[..., 0], EVERYWHERE),
    "target_outside": lambda z, ids, logprobs: rest_to_target_loss(z, ids, logprobs, torch.tensor([[6]]), EVERYWHERE),
}


def made(store: Path, **params: object) -> TeacherCacheDataset:
    folder, _ = examples.commit(store, "topk_cache", params=PARAMS | params)
    return TeacherCacheDataset.from_folders({"topk_cache": [folder]})


@pytest.mark.parametrize("codec", [{}, {"codec": "compact"}])
def test_samples_have_rows_of_k_with_no_probability_behind_what_is_kept(tmp_path: Path, codec: dict[str, str]) -> None:
    found = made(tmp_path, **codec)
    reader = found.readers["topk_cache"]
    for i in range(len(found)):
        sample, lists = found[i], reader[i]["topk_ids"]
        assert isinstance(lists, Ragged)
        assert sample["topk_ids"].shape == sample["topk_logprobs"].shape == (len(lists), examples.K)
        for at, n in enumerate(lists.lengths.tolist()):
            assert sample["topk_ids"][at, :n].tolist() == lists[at].tolist()
            assert (sample["topk_ids"][at, n:] == sample["topk_ids"][at, 0]).all()
            assert sample["topk_logprobs"][at, :n].isfinite().all()
            assert sample["topk_logprobs"][at, n:].isneginf().all()
        mass = sample["topk_logprobs"].exp().sum(-1)
        assert ((mass > 0.79) | (sample["topk_logprobs"][:, -1].isfinite())).all()


def test_batches_are_those_of_the_samples(tmp_path: Path) -> None:
    found = made(tmp_path)
    samples, documents = [found[i] for i in range(len(found))], found.documents(range(len(found)))
    expected, batch = collate(samples), padded_batch(documents)
    assert expected.keys() == batch.keys()
    for name in ("topk_ids", "topk_logprobs", "topk_mask", "target_logprob"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    packed = packed_batch([documents], sum(len(d["input_ids"]) for d in documents))
    assert packed["topk_logprobs"][packed["topk_mask"]].isneginf().any()
    assert (packed["topk_logprobs"].isneginf() == (packed["topk_logprobs"] == -np.inf)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_fewer_than_k_tokens_is_that_of_so_many_alone_and_so_is_its_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    ids, logprobs = torch.tensor([[[3, 5]]]), torch.tensor([[[0.6, 0.25]]], dtype=torch.float64).log()
    filled_ids = torch.tensor([[[3, 5, 3, 3]]])
    filled = torch.cat([logprobs, torch.full((1, 1, 2), -torch.inf, dtype=torch.float64)], -1)
    loss, of_filled = LOSSES[name](logits, ids, logprobs), LOSSES[name](logits, filled_ids, filled)
    torch.testing.assert_close(of_filled, loss)
    (expected,), (found,) = torch.autograd.grad(loss, logits), torch.autograd.grad(of_filled, logits)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bucket", "left_out", "reverse", "jensen_shannon"])
def test_rows_that_keep_all_ids_and_fewer_stand_beside_each_other(name: str) -> None:
    """k is the whole vocabulary: one row keeps all of it and has no rest, the other has one."""
    logits = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = (torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64).log())
    some = (torch.tensor([[[1, 0, 1]]]), torch.tensor([[[0.7, 0.2, 0.0]]], dtype=torch.float64).log())
    alone = [LOSSES[name](logits, *rows) for rows in (whole, (some[0][..., :2], some[1][..., :2]))]
    mask = torch.ones(1, 2, dtype=torch.bool)
    ids, logprobs = (torch.cat(of, dim=1) for of in zip(whole, some, strict=True))
    two = logits.repeat(1, 2, 1)
    found = {
        "bucket": lambda: response_loss(two, ids, logprobs, mask, temperature=2.0),
        "left_out": lambda: response_loss(two, ids, logprobs, mask, tail="left_out"),
        "reverse": lambda: reverse_response_loss(two, ids, logprobs, mask),
        "jensen_shannon": lambda: jensen_shannon_loss(two, ids, logprobs, mask, beta=0.3),
    }[name]()
    torch.testing.assert_close(found, sum(alone) / 2)


def test_an_id_that_is_there_twice_has_the_sum_of_its_gradients() -> None:
    logits = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    ids, places = torch.tensor([[4, 1, 4]]), (torch.tensor([0]),)

    def of(logits: Tensor) -> Tensor:
        return chosen_logprobs(logits, places, ids, with_rest=True)

    assert torch.autograd.gradcheck(of, (logits,))
