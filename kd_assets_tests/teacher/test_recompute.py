"""The plain path: what it computes, what it leaves out, and what its comparison forgives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.store.codecs.topk_compact import decode_logprobs, encode
from kd_assets.teacher.model.load import as_teacher
from kd_assets.teacher.recompute import Comparison, Reference, Row, reference, sampled_positions
from kd_assets_tests.teacher.tiny import HIDDEN_SIZE, N_BLOCKS, VOCABULARY, tiny_model

CPU = torch.device("cpu")
IDS_L = np.arange(3, 43, dtype=np.uint32)
POSITIONS_P = np.array([0, 7, 38])


def test_sampled_positions_are_few_the_same_each_time_and_have_both_ends() -> None:
    one = sampled_positions(8191, seed=0, document_id="doc")
    assert len(one) == 256
    assert (one[0], one[-1]) == (0, 8190)
    assert (np.diff(one) > 0).all()
    assert np.array_equal(one, sampled_positions(8191, seed=0, document_id="doc"))
    assert not np.array_equal(one, sampled_positions(8191, seed=1, document_id="doc"))
    assert not np.array_equal(one, sampled_positions(8191, seed=0, document_id="other"))
    assert sampled_positions(3, seed=0, document_id="doc").tolist() == [0, 1, 2]
    assert sampled_positions(0, seed=0, document_id="doc").tolist() == []


def test_blocks_and_final_states_are_those_of_transformers() -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    with torch.inference_mode():
        hidden_states = teacher.model(torch.from_numpy(IDS_L.astype(np.int64))[None], output_hidden_states=True)[
            "hidden_states"
        ]
    found = reference(teacher, IDS_L, range(N_BLOCKS), POSITIONS_P)
    for n in range(N_BLOCKS - 1):
        assert torch.equal(found.block_LH[n], hidden_states[n + 1][0])
    assert torch.equal(found.final_LH, hidden_states[-1][0])
    assert torch.equal(teacher.decoder.norm(found.block_LH[N_BLOCKS - 1]), found.final_LH)  # type: ignore[operator]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "mamba", "bert_decoder", "llama4_multimodal"])
def test_logits_of_a_sample_of_positions_are_rows_of_all(architecture: str) -> None:
    teacher = as_teacher(tiny_model(architecture), device=CPU)
    everything, sample = reference(teacher, IDS_L, ()), reference(teacher, IDS_L, (), POSITIONS_P)
    assert everything.logits_PV.shape == (len(IDS_L), VOCABULARY)
    torch.testing.assert_close(sample.logits_PV, everything.logits_PV[POSITIONS_P], rtol=1e-5, atol=1e-5)


def test_head_runs_at_the_sampled_positions_only_and_not_without_any() -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    rows: list[int] = []
    teacher.model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    reference(teacher, IDS_L, (1,), POSITIONS_P)
    without = reference(teacher, IDS_L, (1,), np.arange(0))
    assert rows == [len(POSITIONS_P)]
    assert without.logits_PV.shape == (0, VOCABULARY)
    assert without.final_LH.shape == (len(IDS_L), HIDDEN_SIZE)


def test_model_that_keeps_no_chosen_positions_gives_all_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take a number of last positions instead, and some nothing at all."""
    model = tiny_model("llama")
    expected = reference(as_teacher(model, device=CPU), IDS_L, (), POSITIONS_P).logits_PV
    original = model.forward

    def forward(input_ids: torch.Tensor, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        return original(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    found = reference(as_teacher(model, device=CPU), IDS_L, (), POSITIONS_P)
    torch.testing.assert_close(found.logits_PV, expected, rtol=1e-5, atol=1e-5)


def stored_topk(logits_LV: torch.Tensor, ids_L: np.ndarray) -> Row:
    """What the cache would hold of these logits."""
    logits_MV = logits_LV[:-1]
    logprobs_MV = logits_MV.log_softmax(1)
    values_Mk, ids_Mk = logprobs_MV.topk(4)
    targets_M = torch.from_numpy(ids_L[1:].astype(np.int64))
    return {
        "input_ids": ids_L,
        "topk_ids": ids_Mk.numpy().astype(np.uint32).ravel(),
        "topk_logprobs": values_Mk.numpy().astype(np.float16).ravel(),
        "logsumexp": logits_MV.logsumexp(1).numpy(),
        "target_logprob": logprobs_MV.gather(1, targets_M[:, None])[:, 0].numpy(),
    }


def with_wrong_rows(n_wrong: int) -> tuple[Row, Reference]:
    """A row of the cache in which the first positions are those of other logits."""
    generator = torch.Generator().manual_seed(0)
    plain_LV = torch.randn(len(IDS_L), VOCABULARY, generator=generator) * 3
    stored_LV = plain_LV.clone()
    stored_LV[:n_wrong] = plain_LV[:n_wrong].flip(0) + torch.randn(n_wrong, VOCABULARY, generator=generator)
    expected = Reference(
        positions_P=np.arange(len(IDS_L)), logits_PV=plain_LV, block_LH={}, final_LH=torch.ones(len(IDS_L), 1)
    )
    return stored_topk(stored_LV, IDS_L), expected


@pytest.mark.parametrize(
    ("routed", "dtype", "n_wrong", "passed"),
    [
        (False, torch.bfloat16, 0, True),
        (False, torch.bfloat16, 1, False),
        (True, torch.bfloat16, 3, True),  # of 39 positions a tenth may have taken other experts
        (True, torch.bfloat16, 4, False),
        (True, torch.float32, 1, False),
    ],
)
def test_tokens_that_took_other_experts_are_forgiven_up_to_a_share(
    routed: bool, dtype: torch.dtype, n_wrong: int, passed: bool
) -> None:
    comparison = Comparison(asset="topk_cache", dtype=dtype, seed=0, routed=routed)
    comparison.add(*with_wrong_rows(n_wrong))
    result = comparison.result(["doc"])
    assert result["passed"] is passed
    assert result["n_positions"] == len(IDS_L) - 1
    assert result.get("share_beyond_tolerance") == (
        n_wrong / (len(IDS_L) - 1) if routed and dtype == torch.bfloat16 else None
    )


def test_logits_that_are_all_zero_are_compared_with_the_rounding_of_their_logarithm() -> None:
    """As after a first token whose embedding is 0: relative to the largest logit there is no room at all."""
    logits_LV = torch.zeros(len(IDS_L), VOCABULARY)
    row = stored_topk(logits_LV, IDS_L)
    row["logsumexp"] = np.nextafter(row["logsumexp"], np.float32(np.inf))
    row["target_logprob"] = np.nextafter(row["target_logprob"], np.float32(-np.inf))
    expected = Reference(
        positions_P=np.arange(len(IDS_L)), logits_PV=logits_LV, block_LH={}, final_LH=torch.zeros(len(IDS_L), 1)
    )
    comparison = Comparison(asset="topk_cache", dtype=torch.float32, seed=0)
    comparison.add(row, expected)
    assert comparison.result(["doc"])["passed"] is True


@pytest.mark.parametrize(
    ("move", "passes"),
    [(lambda row: row, True), (lambda row: np.roll(row, 1, axis=0), False), (lambda row: row + 0.5, False)],
)
def test_what_a_codec_may_change_is_forgiven_and_no_more(
    move: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], passes: bool
) -> None:
    torch.manual_seed(3)
    logits_LV = torch.randn(len(IDS_L), VOCABULARY) * 3
    row, expected = (
        stored_topk(logits_LV, IDS_L),
        Reference(
            positions_P=np.arange(len(IDS_L) - 1),
            logits_PV=logits_LV[:-1],
            block_LH={},
            final_LH=torch.empty(0),
        ),
    )
    coded_rows = encode(row["topk_ids"].reshape(-1, 4), row["topk_logprobs"].reshape(-1, 4))
    logprobs_Mk, _ = decode_logprobs(coded_rows.codes, coded_rows.tails_M)
    is_target_Mk = row["topk_ids"].reshape(-1, 4) == IDS_L[1:, None]
    of_target = np.where(is_target_Mk.any(axis=1), (logprobs_Mk * is_target_Mk).sum(axis=1), row["target_logprob"])
    made = row | {
        "topk_logprobs": move(logprobs_Mk).astype(np.float16).reshape(-1),
        "target_logprob": of_target.astype(np.float32),
        "logsumexp": row["logsumexp"].astype(np.float16).astype(np.float32),
    }
    plain = Comparison(asset="topk_cache", dtype=torch.float32, seed=0)
    compact = Comparison(asset="topk_cache", dtype=torch.float32, seed=0, codec="compact")
    plain.add(made, expected)
    compact.add(made, expected)
    assert plain.worst > 1, "without the codec's tolerance none of them passes"
    assert (compact.worst <= 1) is passes, compact.largest
    assert compact.largest["max_abs_logsumexp_difference"] > 0


def test_comparison_takes_the_sampled_positions_that_the_cache_holds() -> None:
    row, expected = with_wrong_rows(1)
    sampled = Reference(
        positions_P=np.array([5, 20, 39]),
        logits_PV=expected.logits_PV[[5, 20, 39]],
        block_LH={},
        final_LH=expected.final_LH,
    )
    comparison = Comparison(asset="topk_cache", dtype=torch.float32, seed=0)
    comparison.add(row, sampled)  # position 39 has no next token, position 0 is wrong and not in the sample
    assert comparison.result(["doc"])["passed"] is True
    assert comparison.n_positions == 2
