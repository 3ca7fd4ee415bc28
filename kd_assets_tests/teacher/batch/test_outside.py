"""Distributions that are cut to a student's ids: against whole float64 distributions over these ids."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets.contract import TokenIds
from kd_assets.teacher.batch import outside
from kd_assets.teacher.batch.engine import Engine, Step, TopkRows, TopkStep
from kd_assets.teacher.batch.outside import Outside, masked, outside_mass
from kd_assets.teacher.batch.sampling import drawn_ids, uniforms
from kd_assets.teacher.batch.topk import topk_logprobs
from kd_assets.teacher.model import head as head_module
from kd_assets.teacher.model.load import as_teacher
from kd_assets_tests.teacher.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOLES = TokenIds.of([*range(3, 50), 60, 61, *range(70, 190)])
SETS = {
    "below 150": TokenIds.below(150),
    "holes": HOLES,
    "one": TokenIds.of([7]),
    "every other one": TokenIds.of(range(1, VOCABULARY, 2)),
    "all but the first": TokenIds.of(range(1, VOCABULARY)),
    "all": TokenIds.below(VOCABULARY),
    "more than all": TokenIds.below(3 * VOCABULARY),
    "beyond": TokenIds.of([0, 1, 5, 10**6]),
}


def logits_of(n: int = 40, *, dtype: torch.dtype = torch.float32, spread: float = 6.0) -> Tensor:
    return (torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(1)) * spread).to(dtype)


def kept_ids(token_ids: TokenIds) -> list[int]:
    return [i for i in range(VOCABULARY) if i in token_ids]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_everything_is_of_the_distribution_over_the_kept_ids(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "SCRATCH_BYTES", {"cpu": 12 * VOCABULARY * 7})  # runs of a few rows
    token_ids, logits_NV = SETS[name], logits_of(dtype=dtype)
    ids = kept_ids(token_ids)
    dense_Nv = logits_NV.double()[:, ids]
    k, targets_N = min(5, len(ids)), torch.tensor(ids)[torch.arange(40) % len(ids)]
    expected_Nk, columns_Nk = dense_Nv.log_softmax(dim=1).sort(dim=1, descending=True, stable=True)
    mass_N = 1 - logits_NV.double().softmax(dim=1)[:, ids].sum(dim=1)

    cut_NV = logits_NV.clone()
    log_outside_N = Outside(token_ids, vocabulary_size=VOCABULARY, device=CPU).cut(cut_NV)
    found = topk_logprobs(cut_NV, targets_N, k)
    assert torch.equal(found.ids_Nk, torch.tensor(ids)[columns_Nk[:, :k]])
    torch.testing.assert_close(found.logprobs_Nk.double(), expected_Nk[:, :k], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.logsumexp_N.double(), dense_Nv.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    at_target_N = dense_Nv.log_softmax(dim=1)[range(40), [ids.index(t) for t in targets_N.tolist()]]
    torch.testing.assert_close(found.target_logprob_N.double(), at_target_N, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(outside_mass(log_outside_N, found.logsumexp_N).double(), mass_N, rtol=1e-5, atol=1e-14)
    assert torch.equal(cut_NV, masked(logits_NV, token_ids))


@pytest.mark.parametrize("name", ["all", "more than all"])
def test_where_nothing_is_left_out_nothing_changes_and_the_mass_is_0(name: str) -> None:
    logits_NV = logits_of()
    cut_NV = logits_NV.clone()
    log_outside_N = Outside(SETS[name], vocabulary_size=VOCABULARY, device=CPU).cut(cut_NV)
    assert torch.equal(cut_NV, logits_NV)
    assert outside_mass(log_outside_N, logits_NV.logsumexp(dim=1)).tolist() == [0.0] * 40


@pytest.mark.parametrize("apart", [0.0, 20.0, 60.0, 86.0, 200.0])
def test_a_small_mass_is_right_to_its_last_places_and_so_is_a_large_one(apart: float) -> None:
    """1 minus the rest would be 0 from 17 on."""
    logits_NV = torch.zeros(2, 8)
    logits_NV[0, :4], logits_NV[1, 4:] = apart, apart
    log_outside_N = Outside(TokenIds.below(4), vocabulary_size=8, device=CPU).cut(logits_NV)
    small, large = outside_mass(log_outside_N, logits_NV.logsumexp(dim=1)).tolist()
    assert small == pytest.approx(1 / (1 + math.exp(apart)), rel=2e-5, abs=1e-40)
    assert large == pytest.approx(1 / (1 + math.exp(-apart)), rel=2e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_logit_that_is_left_out_is_still_found(broken: float) -> None:
    """The mass could not be known: padding that no one trained is no excuse."""
    logits_NV = logits_of(2)
    logits_NV[1, 199] = broken
    log_outside_N = Outside(TokenIds.below(150), vocabulary_size=VOCABULARY, device=CPU).cut(logits_NV)
    mass_N = outside_mass(log_outside_N, logits_NV.logsumexp(dim=1))
    assert mass_N.isfinite().tolist() == [True, False]


def test_logits_of_padding_that_are_minus_infinity_already_have_no_mass() -> None:
    logits_NV = logits_of(2)
    logits_NV[:, 190:] = -math.inf
    log_outside_N = Outside(TokenIds.below(190), vocabulary_size=VOCABULARY, device=CPU).cut(logits_NV)
    assert outside_mass(log_outside_N, logits_NV.logsumexp(dim=1)).tolist() == [0.0, 0.0]


def test_draws_are_of_the_kept_ids_in_their_shares() -> None:
    logits_NV, n = logits_of(3, spread=1.5), 20_000
    expected_NV = masked(logits_NV, HOLES).double().softmax(dim=1)
    Outside(HOLES, vocabulary_size=VOCABULARY, device=CPU).cut(logits_NV)
    u_Nd = torch.from_numpy(uniforms(0, "d", 3, n))
    drawn_Nd = drawn_ids(logits_NV, logits_NV.amax(dim=1), u_Nd)
    assert all(int(i) in HOLES for i in set(drawn_Nd.flatten().tolist()))
    shares_NV = torch.stack([row.bincount(minlength=VOCABULARY) for row in drawn_Nd]).double() / n
    deviation_NV = (expected_NV * (1 - expected_NV) / n).sqrt()
    assert ((shares_NV - expected_NV).abs() <= 5 * deviation_NV + 1e-12).all()


IDS_BT = np.arange(2 * 12, dtype=np.int64).reshape(2, 12) * 7 % 150


def step(token_ids: TokenIds | None, *, rows: int = 22, k: int = 4) -> Step:
    rows_M = np.array([*range(11), *range(12, 23)], dtype=np.int64)[:rows]
    return Step(
        ids_BT=IDS_BT,
        rows_N=np.zeros(0, np.int64),
        topk=TopkStep(
            k=k,
            rows_M=rows_M,
            targets_M=IDS_BT.reshape(-1)[rows_M + 1],
            uniforms_Md=uniforms(0, "a", rows, 3),
            token_ids=token_ids,
        ),
    )


def rows_of(engine: Engine, of_step: Step) -> TopkRows:
    topk = engine.run(of_step).topk
    assert topk is not None
    return topk


@pytest.mark.parametrize("own_logits", [False, True])
def test_the_engine_cuts_every_chunk_and_other_steps_are_as_they_were(
    own_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk's memory is used again by the next one; the teacher's own logits are not written to."""
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 16 * 4 * VOCABULARY)
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    if own_logits:
        teacher = dataclasses.replace(teacher, head=None)
    engine = Engine(teacher)
    before = rows_of(engine, step(None))
    cut = rows_of(engine, pickle.loads(pickle.dumps(step(TokenIds.below(150)))))
    holes = rows_of(engine, step(TokenIds.of([*range(150), 199])))
    after = rows_of(engine, step(None))
    assert before.outside_mass_M is None
    assert torch.equal(before.logsumexp_M, after.logsumexp_M)
    assert torch.equal(before.ids_Mk, after.ids_Mk)
    assert cut.outside_mass_M is not None
    assert holes.outside_mass_M is not None
    assert (cut.outside_mass_M > holes.outside_mass_M).all()
    assert (cut.logsumexp_M < holes.logsumexp_M).all()
    assert int(cut.ids_Mk.max()) < 150
    assert cut.finite_M.all()
    # the whole normaliser is that of the kept logits and of the mass outside
    torch.testing.assert_close(cut.logsumexp_M - torch.log1p(-cut.outside_mass_M), before.logsumexp_M)


def test_a_step_without_rows_has_a_mass_of_none() -> None:
    engine = Engine(as_teacher(tiny_model("llama"), device=CPU))
    nothing = rows_of(engine, step(TokenIds.below(150), rows=0))
    assert nothing.outside_mass_M is not None
    assert len(nothing.outside_mass_M) == 0


@pytest.mark.parametrize("n", [4, 33])
def test_k_may_be_all_that_is_kept(n: int) -> None:
    logits_NV, token_ids = logits_of(), TokenIds.of(range(100, 100 + n))
    Outside(token_ids, vocabulary_size=VOCABULARY, device=CPU).cut(logits_NV)
    found = topk_logprobs(logits_NV, torch.full((40,), 100), n)
    assert sorted(found.ids_Nk[0].tolist()) == list(range(100, 100 + n))
    torch.testing.assert_close(found.logprobs_Nk.exp().sum(dim=1), torch.ones(40))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    cpu_NV, token_ids = logits_of(dtype=dtype), HOLES
    gpu_NV = cpu_NV.cuda()
    of_cpu = Outside(token_ids, vocabulary_size=VOCABULARY, device=CPU).cut(cpu_NV)
    of_gpu = Outside(token_ids, vocabulary_size=VOCABULARY, device=gpu_NV.device).cut(gpu_NV)
    torch.testing.assert_close(of_gpu.cpu(), of_cpu)
    assert torch.equal(gpu_NV.cpu(), cpu_NV)
