"""The check `rebuilt`: it holds for every precision, and fails for states that are subtly wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.contract import Asset, FinalState, HiddenStateParams, TopkParams, WorkUnit
from kd_assets.errors import TeacherError
from kd_assets.store import failed_check, read_manifest
from kd_assets.store.codecs.topk_compact import decode_logprobs, encode
from kd_assets.store.schema import hidden_field
from kd_assets.teacher.model.load import Teacher, as_teacher
from kd_assets.teacher.rebuilt import RebuiltComparison, rebuilt_logprobs, states_of
from kd_assets.teacher.recompute import Row, reference
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_model, tiny_params

CPU = torch.device("cpu")
LENGTHS = (40, 33, 50)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEPT = HiddenStateParams(blocks=(), max_length=64, final=("before_norm", "after_norm"))
Spoil = Callable[[torch.Tensor, Teacher], torch.Tensor]


def bits(states_LH: torch.Tensor) -> Any:
    return states_LH.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def uneven_teacher(architecture: str, dtype: torch.dtype) -> Teacher:
    """Norms that do something: with weights of 1, twice is as good as once."""
    model = tiny_model(architecture, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_" in name:
            weight.data.add_(0.4 * torch.randn(weight.shape, generator=generator).to(dtype))
    return as_teacher(model.eval(), device=CPU)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A document as both caches hold it, made by the plain path."""

    topk: Row
    states: dict[str, torch.Tensor]

    def hidden(self, state: FinalState, states_LH: torch.Tensor | None = None) -> Row:
        kept_LH = self.states[state] if states_LH is None else states_LH
        return {"input_ids": self.topk["input_ids"], hidden_field(state): bits(kept_LH)}


def document(teacher: Teacher, index: int, *, k: int = 16) -> Document:
    documents = tiny_documents(LENGTHS)
    ids_L = documents.input_ids[documents.offsets[index] : documents.offsets[index + 1]]
    last = len(teacher.blocks) - 1
    plain = reference(teacher, ids_L, (last - 1,), None, ("before_norm", "after_norm"))
    logprobs_LV = plain.logits_PV.log_softmax(dim=1)[:-1]
    values_Lk, ids_Lk = logprobs_LV.topk(k, dim=1)
    topk = {
        "document_id": np.array([documents.document_ids[index]]),
        "input_ids": ids_L,
        "topk_ids": ids_Lk.numpy().astype(np.uint32).ravel(),
        "topk_logprobs": values_Lk.numpy().astype(np.float16).ravel(),
        "logsumexp": plain.logits_PV.logsumexp(dim=1)[:-1].numpy(),
    }
    states = {str(name): state_LH for name, state_LH in plain.block_LH.items()}
    return Document(topk=topk, states=states | {"previous": plain.block_LH[last - 1]})


def compared(teacher: Teacher, *pairs: tuple[Row, Row]) -> dict[str, Any]:
    comparison = RebuiltComparison(teacher=teacher, seed=0)
    for topk, hidden in pairs:
        comparison.add(topk, hidden)
    return comparison.result()


@torch.inference_mode()
def normed(teacher: Teacher, states_LH: torch.Tensor) -> torch.Tensor:
    assert teacher.end.norm is not None
    found: torch.Tensor = teacher.end.norm(states_LH.to(teacher.dtype)[None])[0]
    return found.float()


def with_noise(states_LH: torch.Tensor) -> torch.Tensor:
    noise_LH = torch.randn(states_LH.shape, generator=torch.Generator().manual_seed(3))
    return states_LH + 0.03 * states_LH.square().mean(dim=1, keepdim=True).sqrt() * noise_LH


@pytest.mark.parametrize("state", ["before_norm", "after_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "granite", "gpt2", "falcon_h1"])
def test_right_states_pass(architecture: str, dtype: torch.dtype, state: FinalState) -> None:
    teacher = uneven_teacher(architecture, dtype)
    found = [document(teacher, i) for i in range(len(LENGTHS))]
    result = compared(teacher, *((one.topk, one.hidden(state)) for one in found))
    assert result["passed"], result
    assert result["n_positions"] == sum(LENGTHS) - len(LENGTHS)
    assert result["states"] == [state]
    assert result["mean_kl"] < 1e-4


def compact(topk: Row, *, k: int = 16, logsumexp: bool = True) -> Row:
    """The rows as a compact cache gives them back."""
    made = encode(topk["topk_ids"].reshape(-1, k), topk["topk_logprobs"].reshape(-1, k))
    rows = topk | {
        "topk_logprobs": decode_logprobs(made.codes, made.tails_M)[0].ravel(),
        "logsumexp": topk["logsumexp"].astype(np.float16).astype(np.float32),
        "target_logprob": np.zeros(len(topk["logsumexp"]), np.float32),
    }
    return rows if logsumexp else {name: values for name, values in rows.items() if name != "logsumexp"}


@pytest.mark.parametrize("logsumexp", [True, False])
@pytest.mark.parametrize("wrong", [None, "previous block", "no norm", "norm twice", "shifted", "another document"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_are_compared_with_compact_rows_within_what_coding_can_change(
    dtype: torch.dtype, wrong: str | None, logsumexp: bool
) -> None:
    teacher = uneven_teacher("llama", dtype)
    one, other = document(teacher, 0), document(teacher, 2)
    right_LH = one.states["after_norm"]
    states: dict[str | None, Callable[[], torch.Tensor]] = {
        None: lambda: right_LH,
        "previous block": lambda: normed(teacher, one.states["previous"]),
        "no norm": lambda: one.states["before_norm"],
        "norm twice": lambda: normed(teacher, right_LH),
        "shifted": lambda: right_LH.roll(1, dims=0),
        "another document": lambda: other.states["after_norm"][: len(right_LH)],
    }
    states_LH = states[wrong]()
    comparison = RebuiltComparison(teacher=teacher, seed=0, codec="compact")
    comparison.add(compact(one.topk, logsumexp=logsumexp), one.hidden("after_norm", states_LH))
    result = comparison.result()
    assert result["passed"] is (wrong is None), result
    assert ("max_abs_logsumexp_difference" in result) is logsumexp


@pytest.mark.parametrize(
    "wrong",
    ["scaled", "previous block", "no norm", "norm twice", "shifted", "noise", "another document"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "granite", "gpt2"])
def test_states_that_are_subtly_wrong_fail(architecture: str, dtype: torch.dtype, wrong: str) -> None:
    teacher = uneven_teacher(architecture, dtype)
    one, other = document(teacher, 0), document(teacher, 2)
    right_LH = one.states["after_norm"]
    spoiled = {
        "scaled": lambda: right_LH * 1.02,
        "previous block": lambda: normed(teacher, one.states["previous"]),
        "no norm": lambda: one.states["before_norm"],
        "norm twice": lambda: normed(teacher, right_LH),
        "shifted": lambda: right_LH.roll(1, dims=0),
        "noise": lambda: with_noise(right_LH),
        "another document": lambda: other.states["after_norm"][: len(right_LH)],
    }[wrong]()
    result = compared(teacher, (one.topk, one.hidden("after_norm", spoiled)))
    assert not result["passed"], result
    assert result["worst_over_tolerance"] > 1


@pytest.mark.parametrize("wrong", ["previous block", "norm twice", "shifted", "noise", "another document"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_from_before_the_norm_that_are_subtly_wrong_fail(dtype: torch.dtype, wrong: str) -> None:
    """But for their scale, which no logits can show: the norm takes it away."""
    teacher = uneven_teacher("llama", dtype)
    one, other = document(teacher, 0), document(teacher, 2)
    right_LH = one.states["before_norm"]
    spoiled = {
        "previous block": lambda: one.states["previous"],
        "norm twice": lambda: one.states["after_norm"],
        "shifted": lambda: right_LH.roll(1, dims=0),
        "noise": lambda: with_noise(right_LH),
        "another document": lambda: other.states["before_norm"][: len(right_LH)],
    }[wrong]()
    assert not compared(teacher, (one.topk, one.hidden("before_norm", spoiled)))["passed"]


def test_one_row_that_is_not_a_number_fails() -> None:
    teacher = uneven_teacher("llama", torch.float32)
    one = document(teacher, 0)
    spoiled_LH = one.states["after_norm"].clone()
    spoiled_LH[5, 0] = torch.nan
    result = compared(teacher, (one.topk, one.hidden("after_norm", spoiled_LH)))
    assert not result["passed"]
    assert result["worst_over_tolerance"] == float("inf")


def test_a_document_of_one_token_has_no_position_to_compare() -> None:
    teacher = uneven_teacher("llama", torch.float32)
    empty = {
        "document_id": np.array(["one"]),
        "input_ids": np.array([3], np.uint32),
        "topk_ids": np.zeros(0, np.uint32),
        "topk_logprobs": np.zeros(0, np.float16),
        "logsumexp": np.zeros(0, np.float32),
    }
    hidden = {"input_ids": empty["input_ids"], "hidden_final_after_norm": np.zeros(32, np.uint16)}
    result = compared(teacher, (empty, hidden))
    assert result == {"passed": None, "not_made": "no position of the sampled documents is in both caches"}


def test_positions_that_both_caches_keep_are_compared() -> None:
    teacher = uneven_teacher("llama", torch.float32)
    one = document(teacher, 0, k=4)
    topk_rows, hidden_rows = np.array([2, 5, 9]), np.array([0, 5, 9, 39])
    topk = one.topk | {
        "positions": topk_rows.astype(np.uint32),
        "topk_ids": one.topk["topk_ids"].reshape(-1, 4)[topk_rows].ravel(),
        "topk_logprobs": one.topk["topk_logprobs"].reshape(-1, 4)[topk_rows].ravel(),
        "logsumexp": one.topk["logsumexp"][topk_rows],
    }
    hidden = {
        "input_ids": topk["input_ids"],
        "positions": hidden_rows.astype(np.uint32),
        "hidden_final_after_norm": bits(one.states["after_norm"][hidden_rows]),
    }
    result = compared(teacher, (topk, hidden))
    assert (result["passed"], result["n_positions"]) == (True, 2)


def test_rebuilt_logprobs_are_the_models_own() -> None:
    teacher = uneven_teacher("gemma2", torch.float32)
    documents = tiny_documents(LENGTHS)
    ids_L = documents.input_ids[: LENGTHS[0]]
    plain = reference(teacher, ids_L, (), None, ("before_norm", "after_norm"))
    expected_LV = plain.logits_PV.log_softmax(dim=1)
    for state in ("before_norm", "after_norm"):
        found_LV = rebuilt_logprobs(teacher, bits(plain.block_LH[state]), state)
        torch.testing.assert_close(found_LV, expected_LV, atol=0.05, rtol=0)
    assert states_of(bits(plain.final_LH)).dtype == torch.bfloat16


def test_a_teacher_without_a_proven_head_is_refused_in_words() -> None:
    teacher = as_teacher(tiny_model("modernbert_decoder"), device=CPU)
    with pytest.raises(TeacherError, match="cannot be rebuilt from final states: the teacher's logits are not"):
        rebuilt_logprobs(teacher, np.zeros((2, 32), np.uint16), "before_norm")


# ------------------------------------------------------------------------------------------------------ in a pass


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def checks_of(unit: WorkUnit) -> dict[str, dict[str, Any]]:
    return {output.asset: dict(read_manifest(Path(output.path)).checks) for output in unit.outputs}


def fingerprints(unit: WorkUnit) -> dict[str, str]:
    return {output.asset: output.fingerprint for output in unit.outputs}


def test_two_caches_of_one_pass_are_compared_and_the_states_say_so(tmp_path: Path, teacher_folder: Path) -> None:
    desk, params = Desk(tmp_path), tiny_params(teacher_folder, hidden_states=KEPT)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    checks = checks_of(unit)
    record = checks["hidden_state_cache"]["rebuilt"]
    assert record["passed"] is True
    assert record["same_pass"] is True
    assert record["states"] == ["before_norm", "after_norm"]
    assert record["document_ids"] == checks["hidden_state_cache"]["recomputed"]["document_ids"]
    assert record["n_positions"] > 0
    assert record["compared_with"] == fingerprints(unit)["topk_cache"]
    assert "rebuilt" not in checks["topk_cache"]
    assert "rebuilt" not in checks["embedding_cache"]


@pytest.mark.parametrize("first", ["topk_cache", "hidden_state_cache"])
def test_the_cache_that_is_made_last_has_the_comparison_with_the_one_that_was_there(
    tmp_path: Path, teacher_folder: Path, first: str
) -> None:
    desk, params = Desk(tmp_path), tiny_params(teacher_folder, hidden_states=KEPT)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params, ("topk_cache", "hidden_state_cache"))
    folders = {output.asset: (output.path,) for output in unit.outputs}
    before, after = sorted(unit.outputs, key=lambda output: output.asset != first)
    for output in (before, after):
        desk.run(params, dataclasses.replace(unit, inputs=unit.inputs | folders, outputs=(output,)))
    checks = checks_of(unit)
    assert "rebuilt" not in checks[before.asset]
    assert checks[after.asset]["rebuilt"]["passed"] is True
    assert checks[after.asset]["rebuilt"]["same_pass"] is False
    assert checks[after.asset]["rebuilt"]["compared_with"] == before.fingerprint


def test_a_cache_that_was_changed_on_disk_is_not_compared_and_the_record_says_why(
    tmp_path: Path, teacher_folder: Path
) -> None:
    desk, params = Desk(tmp_path), tiny_params(teacher_folder, hidden_states=KEPT)
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params, ("topk_cache", "hidden_state_cache"))
    folders = {output.asset: (output.path,) for output in unit.outputs}
    topk, hidden = unit.outputs
    desk.run(params, dataclasses.replace(unit, outputs=(topk,)))
    for part in Path(topk.path).glob("part-*"):
        part.chmod(0o644)
        part.write_bytes(part.read_bytes()[:-9] + b"damaged!!")
    desk.run(params, dataclasses.replace(unit, inputs=unit.inputs | folders, outputs=(hidden,)))
    record = checks_of(unit)["hidden_state_cache"]["rebuilt"]
    assert record["passed"] is None
    assert "part-" in record["not_made"]
    assert failed_check(read_manifest(Path(hidden.path))) is None


@pytest.mark.parametrize(
    "params",
    [{"hidden_states": HiddenStateParams(blocks=(1,), max_length=64)}, {"hidden_states": KEPT, "topk": None}],
    ids=["no final state", "no top-k"],
)
def test_a_partition_without_both_caches_says_nothing_of_it(
    tmp_path: Path, teacher_folder: Path, params: dict[str, Any]
) -> None:
    desk, asked = Desk(tmp_path), tiny_params(teacher_folder, embeddings=None, **params)
    assets: tuple[Asset, ...] = ("hidden_state_cache",) if asked.topk is None else ("topk_cache", "hidden_state_cache")
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), asked, assets)
    desk.run(asked, unit)
    assert all("rebuilt" not in checks for checks in checks_of(unit).values())


def test_states_that_end_sooner_than_the_distributions_are_compared_as_far_as_they_go(
    tmp_path: Path, teacher_folder: Path
) -> None:
    short = dataclasses.replace(KEPT, max_length=7)
    desk = Desk(tmp_path)
    params = tiny_params(teacher_folder, hidden_states=short, topk=TopkParams(k=4, max_length=64))
    unit = desk.unit(desk.commit_shard(tiny_documents(LENGTHS)), params)
    desk.run(params, unit)
    record = checks_of(unit)["hidden_state_cache"]["rebuilt"]
    assert record["passed"] is True
    assert record["n_positions"] == 2 * 7 * record["n_documents"]
