"""The pass against a plain full forward of each document alone. (All architectures: `test_architectures`.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_assets.contract import EmbeddingParams, HiddenStateParams, TopkParams
from kd_assets.errors import NonFiniteTeacherError
from kd_assets.store import Documents, Shard
from kd_assets.teacher.batch.engine import Engine, bfloat16_bits, pooled_states
from kd_assets.teacher.batch.forward import run_forward
from kd_assets.teacher.batch.transfer import Collector, copier
from kd_assets.teacher.model import head as head_module
from kd_assets.teacher.model.load import Teacher, as_teacher
from kd_assets.teacher.partition.batching import plan_batches
from kd_assets.teacher.partition.window import CacheRequest, Capture, Window
from kd_assets.teacher.recompute import reference
from kd_assets_tests.teacher.tiny import (
    LONGROPE,
    N_BLOCKS,
    Desk,
    bfloat16_values,
    tiny_documents,
    tiny_model,
)

CPU = torch.device("cpu")
SEED = 0
LENGTHS = (3, 1, 20, 64, 37, 5, 9, 30, 12, 2, 40)
EVERYTHING = CacheRequest(
    topk=TopkParams(k=4, max_length=64),
    hidden_states=HiddenStateParams(blocks=tuple(range(N_BLOCKS)), max_length=64),
    embeddings=EmbeddingParams(max_length=64),
)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return Desk(tmp_path).read_shard(tiny_documents(LENGTHS))


def captured(teacher: Teacher, shard: Shard, wanted: CacheRequest = EVERYTHING, *, budget: int = 128) -> Window:
    """One window over the whole shard."""
    engine = Engine(teacher)
    window = Window.of(shard, 0, len(shard.document_ids), max_length=64, wanted=wanted, hidden_size=teacher.hidden_size)
    with Collector(copier(teacher.device)) as collector:
        for batch in plan_batches(window.documents.n_tokens_D, token_budget=budget, alone_above=teacher.alone_above):
            capture = Capture(window=window, batch=batch, partition_key="shard-00000", seed=SEED)
            collector.submit(engine.run(capture.step()), capture.keep)
    return window


def alone(teacher: Teacher, documents: Documents) -> list[dict[str, torch.Tensor]]:
    """Every document by itself through the model's own forward: all logits, all blocks, float32."""
    results = []
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids_L = documents.input_ids[start:end]
        plain = reference(teacher, ids_L, range(N_BLOCKS))
        logprobs_LV = torch.log_softmax(plain.logits_PV, dim=1)
        following_L1 = torch.from_numpy(ids_L[1:].astype(np.int64))[:, None]
        results.append(
            {
                "topk": logprobs_LV[:-1].topk(4).values,
                "logprobs": logprobs_LV[:-1],
                "logsumexp": plain.logits_PV[:-1].logsumexp(1),
                "target": logprobs_LV[:-1].gather(1, following_L1)[:, 0],
                "mean": plain.final_LH.mean(0, keepdim=True),
                "last": plain.final_LH[-1:],
                **{f"block {n}": plain.block_LH[n] for n in range(N_BLOCKS)},
            }
        )
    return results


def stacked(results: list[dict[str, torch.Tensor]], name: str) -> np.ndarray:
    return torch.cat([result[name] for result in results]).numpy()


def assert_close(found: np.ndarray, plain: np.ndarray, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    np.testing.assert_allclose(found.astype(np.float64), plain.astype(np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen3_moe", "gemma2", "granite", "phi", "gpt_neox"])
def test_every_cache_equals_the_plain_forward(architecture: str, shard: Shard) -> None:
    """To 1e-5 in float32; what is stored in 16 bits, to half a unit in its last place more."""
    teacher = as_teacher(tiny_model(architecture), device=CPU)
    assert teacher.head is not None, "the head of this architecture must be proven"
    window = captured(teacher, shard)
    plain = alone(teacher, window.documents)
    assert window.topk is not None
    assert window.hidden_states is not None
    assert window.embeddings is not None
    assert_close(window.topk.logprobs_Mk, stacked(plain, "topk"), rtol=2**-11, atol=1e-5)
    at_ids = np.take_along_axis(stacked(plain, "logprobs"), window.topk.ids_Mk.astype(np.int64), axis=1)
    assert_close(window.topk.logprobs_Mk, at_ids, rtol=2**-11, atol=1e-5)
    assert_close(window.topk.logsumexp_M, stacked(plain, "logsumexp"), atol=1e-5)
    assert_close(window.topk.target_logprob_M, stacked(plain, "target"), atol=1e-5)
    assert_close(window.embeddings.mean_DH, stacked(plain, "mean"), atol=1e-5)
    assert_close(window.embeddings.last_token_DH, stacked(plain, "last"), atol=1e-5)
    for block in range(N_BLOCKS):
        plain_NH = stacked(plain, f"block {block}")
        assert_close(
            bfloat16_values(window.hidden_states.block_NH[block]),
            plain_NH,
            rtol=2**-8,
            atol=1e-5 * np.abs(plain_NH).max(),
        )


def test_gemma2_caps_its_attention_logits() -> None:
    """No SDPA kernel can: the cap of 2.0 must show in the states, whichever version of transformers is installed."""
    ids_BT = torch.arange(20).view(1, 20)
    capped = as_teacher(tiny_model("gemma2", attn_implementation="eager"), device=CPU)
    uncapped = as_teacher(tiny_model("gemma2", attn_implementation="eager", attn_logit_softcapping=None), device=CPU)
    states = [run_forward(t, ids_BT, blocks=(), needs_final=True).final_FH for t in (capped, uncapped)]
    assert states[0] is not None
    assert states[1] is not None
    assert not torch.allclose(states[0], states[1], atol=1e-2)


def test_state_of_the_last_block_is_its_own_output_before_the_final_norm() -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    ids_BT = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        hidden_states = teacher.model(ids_BT, output_hidden_states=True).hidden_states
        states = run_forward(teacher, ids_BT, blocks=tuple(range(N_BLOCKS)), needs_final=True)
        assert states.final_FH is not None
        for block in range(N_BLOCKS - 1):
            assert torch.equal(states.block_FH[block], hidden_states[block + 1].flatten(0, 1))
        last_FH = states.block_FH[N_BLOCKS - 1]
        assert not torch.equal(last_FH, hidden_states[-1].flatten(0, 1))
        assert torch.equal(teacher.decoder.norm(last_FH), hidden_states[-1].flatten(0, 1))  # type: ignore[operator]
        assert torch.equal(states.final_FH, hidden_states[-1].flatten(0, 1))


def test_hidden_states_alone_stop_the_pass_at_their_last_block_and_are_the_same_bits(shard: Shard) -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    ran: list[int] = []
    for n, module in enumerate(teacher.blocks):
        module.register_forward_hook(lambda module, args, output, n=n: ran.append(n))
    hidden = HiddenStateParams(blocks=(0, 1), max_length=64)
    only = captured(teacher, shard, CacheRequest(hidden_states=hidden))
    assert set(ran) == {0, 1}
    everything = captured(teacher, shard, CacheRequest(hidden_states=hidden, topk=EVERYTHING.topk))
    assert set(ran) == {0, 1, 2}
    assert only.hidden_states is not None
    assert everything.hidden_states is not None
    for block in (0, 1):
        assert np.array_equal(only.hidden_states.block_NH[block], everything.hidden_states.block_NH[block])


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_batch_composition_does_not_change_results(shard: Shard, budget: int) -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    one, other = captured(teacher, shard, budget=128), captured(teacher, shard, budget=budget)
    assert one.topk is not None
    assert other.topk is not None
    assert one.embeddings is not None
    assert other.embeddings is not None
    assert_close(other.topk.logsumexp_M, one.topk.logsumexp_M, atol=1e-5)
    assert_close(other.topk.logprobs_Mk, one.topk.logprobs_Mk, rtol=2**-10, atol=1e-5)
    assert_close(other.embeddings.mean_DH, one.embeddings.mean_DH, atol=1e-5)


def test_chunk_size_does_not_change_results(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    whole = captured(teacher, shard)
    monkeypatch.setattr(head_module, "CPU_CHUNK_BYTES", 1)
    chunked = captured(teacher, shard)
    assert whole.topk is not None
    assert chunked.topk is not None
    assert_close(chunked.topk.logsumexp_M, whole.topk.logsumexp_M, atol=1e-5)
    assert_close(chunked.topk.logprobs_Mk, whole.topk.logprobs_Mk, rtol=2**-10, atol=1e-5)


def test_caches_of_different_max_length_come_from_one_pass(shard: Shard) -> None:
    """A causal model's state at a token does not depend on what follows: a cut document is a prefix of the whole."""
    teacher = as_teacher(tiny_model("llama"), device=CPU)
    cut = captured(
        teacher,
        shard,
        CacheRequest(
            topk=TopkParams(k=4, max_length=10),
            hidden_states=HiddenStateParams(blocks=(1,), max_length=7),
            embeddings=EmbeddingParams(max_length=64),
        ),
    )
    assert cut.topk is not None
    assert cut.hidden_states is not None
    assert cut.topk.documents.n_tokens_D.tolist() == [min(n, 10) for n in LENGTHS]
    plain_topk = alone(teacher, cut.topk.documents)
    assert_close(cut.topk.logsumexp_M, stacked(plain_topk, "logsumexp"), atol=1e-5)
    assert_close(cut.topk.target_logprob_M, stacked(plain_topk, "target"), atol=1e-5)
    plain_hidden = alone(teacher, cut.hidden_states.documents)
    assert_close(
        bfloat16_values(cut.hidden_states.block_NH[1]), stacked(plain_hidden, "block 1"), rtol=2**-8, atol=1e-4
    )


def test_documents_do_not_feel_the_frequencies_that_a_longer_one_in_their_batch_needs(shard: Shard) -> None:
    teacher = as_teacher(tiny_model("llama", rope_parameters=LONGROPE), device=CPU)
    window = captured(teacher, shard, budget=4096)
    assert window.topk is not None
    assert_close(window.topk.logsumexp_M, stacked(alone(teacher, window.documents), "logsumexp"), atol=1e-5)


def test_documents_of_one_token_have_states_and_no_predictions(tmp_path: Path) -> None:
    shard = Desk(tmp_path).read_shard(tiny_documents([1, 1]))
    window = captured(as_teacher(tiny_model("llama"), device=CPU), shard)
    assert window.topk is not None
    assert window.hidden_states is not None
    assert window.topk.logsumexp_M.shape == (0,)
    assert window.hidden_states.block_NH[0].shape[0] == 2


def test_unproven_head_falls_back_to_the_models_own_logits(shard: Shard) -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    original = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
        return output

    model.forward = forward
    warnings: list[str] = []
    teacher = as_teacher(model, device=CPU, warn=warnings.append)
    assert teacher.head is None
    assert "falling back to the model's own logits" in warnings[0]
    window = captured(teacher, shard)
    plain = alone(teacher, window.documents)
    assert window.topk is not None
    assert window.embeddings is not None
    assert_close(window.topk.logsumexp_M, stacked(plain, "logsumexp"), atol=1e-5)
    assert_close(window.topk.logprobs_Mk, stacked(plain, "topk"), rtol=2**-11, atol=1e-5)
    assert_close(window.embeddings.mean_DH, stacked(plain, "mean"), atol=1e-5)


@pytest.mark.parametrize("wanted", ["topk", "hidden_states", "embeddings"])
def test_nan_of_the_teacher_names_the_document(wanted: str, shard: Shard) -> None:
    """The embedding of one token id is NaN; the shortest document that has it is `doc-005`."""
    model = tiny_model("llama")
    token = int(shard.slice(5, 1).input_ids[2])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    holders = [i for i in range(len(LENGTHS)) if token in shard.slice(i, 1).input_ids]
    teacher = as_teacher(model, device=CPU)
    with pytest.raises(NonFiniteTeacherError, match=r"partition shard-00000: .*NaN or infinity.* document 'doc-") as e:
        captured(teacher, shard, CacheRequest(**{wanted: getattr(EVERYTHING, wanted)}))
    assert any(f"'doc-{i:03d}'" in str(e.value) for i in holders)


def test_pooling_ignores_padding_even_where_it_is_nan() -> None:
    final_BTH = torch.tensor([[[1.0], [3.0], [8.0]], [[5.0], [float("nan")], [float("nan")]]])
    pooled = pooled_states(final_BTH, torch.tensor([3, 1]))
    assert pooled.mean_BH.tolist() == [[4.0], [5.0]]
    assert pooled.last_BH.tolist() == [[8.0], [5.0]]
    assert pooled.finite_B.tolist() == [True, True]


def test_mean_accumulates_in_float32() -> None:
    """In bfloat16 a sum of 1,000 ones would stop at 256."""
    mean_BH = pooled_states(torch.ones(1, 1000, 1, dtype=torch.bfloat16), torch.tensor([1000])).mean_BH
    assert mean_BH.dtype == torch.float32
    assert mean_BH.item() == 1.0


def test_states_are_rounded_to_the_nearest_bfloat16() -> None:
    bits = bfloat16_bits(torch.tensor([1.0, -2.0, 1.0 + 2**-9, 1.0 + 3 * 2**-9])).numpy().view(np.uint16)
    assert bits.tolist() == [0x3F80, 0xC000, 0x3F80, 0x3F81]
