"""Cutting documents into parts, and arrays into tables."""

from __future__ import annotations

import numpy as np
import pytest

from kd_assets.store import (
    PartPlan,
    encode_embeddings,
    encode_hidden_states,
    encode_shard,
    encode_topk,
    part_stats,
    plan_parts,
)
from kd_assets_tests.store import examples


def sizes(plans: tuple[PartPlan, ...]) -> list[int]:
    return [plan.n_documents for plan in plans]


@pytest.mark.parametrize(
    ("lengths", "max_documents", "max_tokens", "expected"),
    [
        ([], 2, 10, []),
        ([5], 2, 10, [1]),
        ([5, 5, 5], 2, 100, [2, 1]),
        ([5, 5, 5], 9, 10, [2, 1]),
        ([5, 6, 5], 9, 10, [1, 1, 1]),
        ([50, 1, 1], 9, 10, [1, 2]),
        ([1, 50, 1], 9, 10, [1, 1, 1]),
        ([1, 9, 1, 9], 9, 10, [2, 2]),
    ],
)
def test_parts_are_greedy_and_within_both_limits(
    lengths: list[int], max_documents: int, max_tokens: int, expected: list[int]
) -> None:
    plans = plan_parts(np.array(lengths, dtype=np.int64), max_documents=max_documents, max_tokens=max_tokens)
    assert sizes(plans) == expected
    assert [plan.index for plan in plans] == list(range(len(plans)))
    assert [plan.first_document for plan in plans] == np.cumsum([0, *expected])[:-1].tolist()


def test_every_document_is_in_exactly_one_part() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    plans = plan_parts(lengths, max_documents=7, max_tokens=512)
    covered = [i for plan in plans for i in range(plan.first_document, plan.first_document + plan.n_documents)]
    assert covered == list(range(500))
    for plan in plans:
        tokens = lengths[plan.first_document : plan.first_document + plan.n_documents].sum()
        assert plan.n_documents == 1 or (tokens <= 512 and plan.n_documents <= 7)


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_parts(np.array([1]), max_documents=limits[0], max_tokens=limits[1])


def test_slice_cuts_each_document_to_its_first_tokens() -> None:
    docs = examples.documents((5, 1, 3))
    cut = docs.slice(0, 3, 2)
    first, second, third = docs.input_ids[0:5], docs.input_ids[5:6], docs.input_ids[6:9]
    assert cut.offsets.tolist() == [0, 2, 3, 5]
    assert cut.input_ids.tolist() == [*first[:2], *second, *third[:2]]
    assert cut.document_ids == ["document-0", "document-1", "document-2"]
    assert len(cut.loss_mask) == 5


def test_slice_without_a_cut_is_a_view() -> None:
    docs = examples.documents((5, 1, 3))
    part = docs.slice(1, 2, 100)
    assert np.shares_memory(part.input_ids, docs.input_ids)
    assert part.offsets.tolist() == [0, 1, 4]
    assert docs.slice(3, 0).n_documents == 0


@pytest.mark.parametrize(("first", "n"), [(-1, 1), (0, 4), (3, 1), (0, -1)])
def test_slice_outside_the_documents_is_refused(first: int, n: int) -> None:
    with pytest.raises(ValueError, match="of 3"):
        examples.documents((5, 1, 3)).slice(first, n)


def test_wrong_shapes_and_dtypes_are_refused_by_name() -> None:
    docs = examples.documents((3, 2))
    positions = np.zeros(3, np.float32)
    ids, logprobs = np.zeros((3, 2), np.uint32), np.zeros((3, 2), np.float16)
    with pytest.raises(ValueError, match=r"topk_logprobs must be float16 \[3, 2\], found float32"):
        encode_topk(
            docs,
            topk_ids_Mk=ids,
            topk_logprobs_Mk=logprobs.astype(np.float32),
            logsumexp_M=positions,
            target_logprob_M=positions,
        )
    with pytest.raises(ValueError, match=r"topk_ids must be uint32 \[3, 2\], found uint32 \[4, 2\]"):
        encode_topk(
            docs,
            topk_ids_Mk=np.zeros((4, 2), np.uint32),
            topk_logprobs_Mk=logprobs,
            logsumexp_M=positions,
            target_logprob_M=positions,
        )
    with pytest.raises(ValueError, match=r"hidden_block_1 must be uint16 \[5, 4\], found uint16 \[5, 3\]"):
        encode_hidden_states(docs, {0: np.zeros((5, 4), np.uint16), 1: np.zeros((5, 3), np.uint16)})
    with pytest.raises(ValueError, match="no states"):
        encode_hidden_states(docs, {})
    with pytest.raises(ValueError, match="last_token_embedding must be"):
        encode_embeddings(docs, mean_DH=np.zeros((2, 4), np.float32), last_token_DH=np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match="1 sources for 2 documents"):
        encode_shard(docs, ["corpus"], np.zeros(2, np.int64))


def test_encoders_take_arrays_that_are_not_contiguous() -> None:
    docs = examples.documents((3, 2))
    states = np.arange(40, dtype=np.uint16).reshape(5, 8)[:, ::2]
    rows = encode_hidden_states(docs, {0: states})
    assert np.array(rows["hidden_block_0"].to_pylist()[1]).tolist() == states[3:].tolist()


def test_topk_statistics_count_what_is_not_finite_and_leave_it_out() -> None:
    docs = examples.documents((3, 2))
    logprobs = np.log(np.array([[0.5, 0.25], [0.9, 0.05], [0.7, 0.2]])).astype(np.float16)
    numbers = np.zeros(3, np.float32)
    ids = np.zeros((3, 2), np.uint32)
    fine = encode_topk(docs, topk_ids_Mk=ids, topk_logprobs_Mk=logprobs, logsumexp_M=numbers, target_logprob_M=numbers)
    stats = part_stats("topk_cache", fine)
    assert (stats["n_non_finite"], stats["n_positions"]) == (0, 3)
    assert stats["max_probability_sum"] == pytest.approx(0.95, abs=1e-3)
    assert stats["min_logprob"] == pytest.approx(np.log(0.05), abs=2e-3)

    logprobs[0, 1], logprobs[2, 0] = np.nan, -np.inf
    numbers = np.array([0, np.inf, 0], np.float32)
    bad = encode_topk(docs, topk_ids_Mk=ids, topk_logprobs_Mk=logprobs, logsumexp_M=numbers, target_logprob_M=numbers)
    stats = part_stats("topk_cache", bad)
    assert stats["n_non_finite"] == 4
    assert stats["max_probability_sum"] == pytest.approx(0.95, abs=1e-3)
    assert all(np.isfinite(value) for value in stats.values())


def test_draws_are_counted_by_position_in_any_order_they_come_in() -> None:
    docs = examples.documents((3, 1, 2))
    sampled = np.array([[5, 3, 5], [3, 3, 3], [4_000_000_000, 0, 1]], np.uint32)
    numbers = np.zeros(3, np.float32)
    rows = encode_topk(
        docs,
        topk_ids_Mk=np.zeros((3, 1), np.uint32),
        topk_logprobs_Mk=np.zeros((3, 1), np.float16),
        logsumexp_M=numbers,
        target_logprob_M=numbers,
        sampled_ids_Md=sampled,
    )
    assert rows["sampled_ids"].to_pylist() == [[[3, 5], [3]], [], [[0, 1, 4_000_000_000]]]
    assert rows["sampled_counts"].to_pylist() == [[[1, 2], [3]], [], [[1, 1, 1]]]
    stats = part_stats("topk_cache", rows)
    assert (stats["n_draws"], stats["n_sampled_ids"], stats["max_sampled_id"]) == (9, 6, 4_000_000_000)


def test_hidden_state_statistics_read_the_bits_of_bfloat16() -> None:
    docs = examples.documents((1,))
    numbers = np.array([[1.5, -3.0, 0.0, np.inf, -np.inf, np.nan]], np.float32)
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    assert part_stats("hidden_state_cache", encode_hidden_states(docs, {0: bits[:, :3]})) == {
        "n_non_finite": 0.0,
        "max_abs": 3.0,
    }
    assert part_stats("hidden_state_cache", encode_hidden_states(docs, {0: bits})) == {
        "n_non_finite": 3.0,
        "max_abs": 3.0,
    }


def test_embedding_statistics_count_what_is_not_finite() -> None:
    docs = examples.documents((1,))
    mean, last = np.array([[1, np.nan]], np.float32), np.array([[-4, 2]], np.float32)
    stats = part_stats("embedding_cache", encode_embeddings(docs, mean_DH=mean, last_token_DH=last))
    assert stats == {"n_non_finite": 1.0, "max_abs": 4.0}


def test_documents_of_one_token_have_no_positions() -> None:
    docs = examples.documents((1, 1))
    rows = examples.table("topk_cache", docs)
    assert rows["topk_ids"].to_pylist() == [[], []]
    nothing = {"n_non_finite": 0, "n_positions": 0, "max_probability_sum": 0, "n_kept_mass": 0}
    assert part_stats("topk_cache", rows) == nothing
