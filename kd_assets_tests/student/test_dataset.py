"""The dataset over real caches on disk: joins, exactness, and that no loader or rank sees a document twice."""

from __future__ import annotations

import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from kd_assets.contract import CACHES, Asset, PositionChoice
from kd_assets.errors import CorruptPartError, NotCommittedError, RecipeError, UnknownFieldError, VariantConflictError
from kd_assets.store import CacheReader
from kd_assets.store.layout import INDEX_NAME
from kd_assets.student.dataset import (
    TeacherCacheDataset,
    _tensors_of,
    at_hidden_positions,
    at_topk_positions,
    collate,
)
from kd_assets.student.fields import hidden_fields
from kd_assets_tests.student.made_up import (
    BLOCK,
    HIDDEN_SIZE,
    RECIPE,
    VOCABULARY,
    BigramTeacher,
    MadeUpDocument,
    commit_caches,
    made_up_documents,
)

DOCUMENTS = {"made-up-00000": made_up_documents(7, seed=1), "made-up-00001": made_up_documents(6, seed=2)}
"""Both shards have documents of the same ids: only the pair of shard and id is unique."""

TEACHER = BigramTeacher()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for key, documents in DOCUMENTS.items():
        commit_caches(tmp_path, key, documents, teacher=TEACHER)
    return tmp_path


@pytest.fixture
def dataset(store: Path) -> TeacherCacheDataset:
    return TeacherCacheDataset.from_recipe(store / RECIPE)


def document(sample: dict[str, Any]) -> MadeUpDocument:
    (found,) = [d for d in DOCUMENTS[sample["partition_key"]] if d.document_id == sample["document_id"]]
    return found


def every_key() -> Counter[tuple[str, str]]:
    return Counter((key, d.document_id) for key, documents in DOCUMENTS.items() for d in documents)


def keys_of(batches: Any) -> Counter[tuple[str, str]]:
    return Counter(pair for batch in batches for pair in zip(batch["partition_key"], batch["document_id"], strict=True))


def test_every_sample_says_what_the_teacher_said_of_its_document(dataset: TeacherCacheDataset) -> None:
    assert len(dataset) == 13
    for i in range(len(dataset)):
        sample = dataset[i]
        ids = torch.tensor(document(sample).input_ids)
        assert torch.equal(sample["input_ids"], ids)
        assert sample["loss_mask"].tolist() == list(document(sample).loss_mask)
        logprobs = TEACHER.logits_VV[ids[:-1]].log_softmax(-1)
        expected = logprobs.topk(8)
        assert torch.equal(sample["topk_ids"], expected.indices)
        assert torch.equal(sample["topk_logprobs"], expected.values.half().float())
        torch.testing.assert_close(sample["logsumexp"], TEACHER.logits_VV[ids[:-1]].logsumexp(-1))
        torch.testing.assert_close(sample["target_logprob"], logprobs.gather(-1, ids[1:, None])[:, 0])
        torch.testing.assert_close(sample["mean_embedding"], TEACHER.states_VH[ids].mean(0))
        torch.testing.assert_close(sample["last_token_embedding"], TEACHER.states_VH[ids[-1]])
        assert sample["embedded_tokens"].item() == len(ids)


def test_hidden_states_come_back_in_bfloat16_bit_for_bit(dataset: TeacherCacheDataset) -> None:
    for i in range(len(dataset)):
        sample = dataset[i]
        hidden = sample[f"hidden_block_{BLOCK}"]
        expected = TEACHER.states_VH[sample["input_ids"][: len(hidden)]].bfloat16()
        assert hidden.dtype == torch.bfloat16
        assert torch.equal(hidden.view(torch.int16), expected.view(torch.int16))


def test_final_states_come_after_those_of_blocks_and_are_tensors_like_them() -> None:
    names = ["hidden_final_after_norm", "hidden_block_10", "hidden_final_before_norm", "input_ids", "hidden_block_9"]
    in_order = ["hidden_block_9", "hidden_block_10", "hidden_final_before_norm", "hidden_final_after_norm"]
    assert hidden_fields(names) == in_order
    states_NH = torch.randn(5, 4).bfloat16()
    row = {"hidden_final_after_norm": states_NH.view(torch.int16).numpy().view(np.uint16)}
    sample = _tensors_of("hidden_state_cache", row)
    assert torch.equal(sample["hidden_final_after_norm"].view(torch.int16), states_NH.view(torch.int16))


def test_dtypes_are_those_that_training_wants(dataset: TeacherCacheDataset) -> None:
    dtypes = {name: value.dtype for name, value in dataset[0].items() if isinstance(value, torch.Tensor)}
    assert dtypes == {
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
        "topk_ids": torch.int64,
        "topk_logprobs": torch.float32,
        "logsumexp": torch.float32,
        "target_logprob": torch.float32,
        "hidden_block_3": torch.bfloat16,
        "mean_embedding": torch.float32,
        "last_token_embedding": torch.float32,
        "embedded_tokens": torch.int64,
    }


def test_a_sample_may_be_changed_in_place(dataset: TeacherCacheDataset) -> None:
    before = dataset[0]
    for value in dataset[0].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(dataset[0]["input_ids"], before["input_ids"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("n_workers", [0, 1, 4])
def test_every_sample_comes_exactly_once_with_any_number_of_workers(
    dataset: TeacherCacheDataset, n_workers: int
) -> None:
    _ = dataset[0]  # files are open when the workers are forked
    loader = DataLoader(dataset, batch_size=3, shuffle=True, num_workers=n_workers, collate_fn=collate)
    assert keys_of(loader) == every_key()


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_share_the_samples_without_overlap(store: Path, n_ranks: int) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for rank in range(n_ranks):
        dataset = TeacherCacheDataset.from_recipe(store / RECIPE)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=n_ranks, rank=rank, shuffle=True, drop_last=False
        )
        seen += keys_of(DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate))
    # The sampler fills up the last round by repeating its first samples; nothing is missing.
    assert set(seen) == set(every_key())
    assert sum(seen.values()) == -(-13 // n_ranks) * n_ranks


def test_it_works_after_pickling(dataset: TeacherCacheDataset) -> None:
    _ = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.keys == dataset.keys
    for name, value in copy[5].items():
        assert torch.equal(value, dataset[5][name]) if isinstance(value, torch.Tensor) else value == dataset[5][name]


def test_documents_are_joined_by_id_and_not_by_position(tmp_path: Path) -> None:
    documents = made_up_documents(5)
    commit_caches(tmp_path, "made-up-00000", documents, assets=("topk_cache",))
    commit_caches(tmp_path, "made-up-00000", documents[::-1], assets=("embedding_cache",))
    dataset = TeacherCacheDataset.from_recipe(tmp_path / RECIPE, assets=("topk_cache", "embedding_cache"))
    for i, made_up in enumerate(documents):
        sample = dataset[i]
        assert sample["document_id"] == made_up.document_id
        expected = BigramTeacher().states_VH[torch.tensor(made_up.input_ids)].mean(0)
        torch.testing.assert_close(sample["mean_embedding"], expected)


@pytest.mark.parametrize("asset", CACHES)
def test_one_cache_alone_is_enough(store: Path, asset: Asset) -> None:
    dataset = TeacherCacheDataset.from_recipe(store / RECIPE, assets=(asset,))
    batch = collate([dataset[i] for i in range(4)])
    assert ("topk_ids" in batch) == (asset == "topk_cache")
    assert bool(hidden_fields(batch)) == (asset == "hidden_state_cache")
    assert ("mean_embedding" in batch) == (asset == "embedding_cache")


def test_caches_of_different_shards_are_refused(tmp_path: Path) -> None:
    documents = made_up_documents(3)
    commit_caches(tmp_path, "made-up-00000", documents, assets=("topk_cache",), shard="old shard")
    commit_caches(tmp_path, "made-up-00000", documents, assets=("embedding_cache",), shard="new shard")
    with pytest.raises(VariantConflictError, match=r"made-up-00000.*embedding_cache.*new shard"):
        TeacherCacheDataset.from_recipe(tmp_path / RECIPE, assets=("topk_cache", "embedding_cache"))


def test_a_cache_that_lacks_a_partition_is_refused_by_name(store: Path) -> None:
    folders = {asset: CacheReader(store / RECIPE, asset).folders for asset in CACHES}
    folders["hidden_state_cache"] = folders["hidden_state_cache"][:1]
    with pytest.raises(NotCommittedError, match=r"hidden_state_cache differ by 6 documents.*made-up-00001"):
        TeacherCacheDataset.from_folders(folders)


def test_partitions_that_one_cache_lacks_are_refused_or_left_out_of_all_and_named(store: Path) -> None:
    shutil.rmtree(next((store / RECIPE / "hidden_state_cache").glob("*/made-up-00001")))
    with pytest.raises(NotCommittedError, match=r"differ by 6 documents.*made-up-00001"):
        TeacherCacheDataset.from_recipe(store / RECIPE)
    keys = ["made-up-00000", "made-up-00001"]
    with pytest.raises(NotCommittedError, match=r"hidden_state_cache/.* partition 'made-up-00001' \(1 missing of 2\)"):
        TeacherCacheDataset.from_recipe(store / RECIPE, partition_keys=keys)
    dataset = TeacherCacheDataset.from_recipe(store / RECIPE, partition_keys=keys, missing="skip")
    assert {key for key, _ in dataset.keys} == {"made-up-00000"}
    assert len(dataset) == 7
    assert dataset.left_out == {"made-up-00001": "hidden_state_cache: it has no committed result"}
    assert TeacherCacheDataset.from_recipe(store / RECIPE, missing="skip").left_out == dataset.left_out
    shutil.rmtree(next((store / RECIPE / "topk_cache").glob("*/made-up-00000")))
    with pytest.raises(NotCommittedError, match=r"no partition of .* has all of topk_cache, hidden_state_cache"):
        TeacherCacheDataset.from_recipe(store / RECIPE, missing="skip")


def test_ids_that_rotted_are_damage_and_not_missing_documents(store: Path) -> None:
    part = sorted(CacheReader(store / RECIPE, "hidden_state_cache").folders[0].glob("part-*"))[0]
    data = part.read_bytes()
    part.write_bytes(data.replace(b"doc-1", b"doc-9"))
    with pytest.raises(CorruptPartError, match=f"{part.name} was changed after its commit"):
        keys_of(DataLoader(TeacherCacheDataset.from_recipe(store / RECIPE), batch_size=2, collate_fn=collate))
    (part.parent / INDEX_NAME).unlink()  # then the documents are joined by what the parts say
    with pytest.raises(CorruptPartError, match=f"{part.name} was changed after its commit"):
        TeacherCacheDataset.from_recipe(store / RECIPE)


def test_a_bit_that_flipped_is_named_by_the_loader_whatever_field_it_is_in(store: Path) -> None:
    part = sorted(CacheReader(store / RECIPE, "topk_cache").folders[0].glob("part-*"))[1]
    data = part.read_bytes()
    part.write_bytes(data[:400] + bytes([data[400] ^ 1]) + data[401:])
    with pytest.raises(CorruptPartError, match=f"{part.name} "):
        keys_of(DataLoader(TeacherCacheDataset.from_recipe(store / RECIPE), batch_size=2, collate_fn=collate))


def test_named_partitions_are_read_alone(store: Path) -> None:
    dataset = TeacherCacheDataset.from_recipe(store / RECIPE, partition_keys=["made-up-00001"])
    assert {key for key, _ in dataset.keys} == {"made-up-00001"}
    assert len(dataset) == 6


def test_no_caches_no_length_and_no_tokens_are_refused(store: Path) -> None:
    with pytest.raises(RecipeError, match="at least one cache"):
        TeacherCacheDataset({})
    with pytest.raises(RecipeError, match="max_length is 0"):
        TeacherCacheDataset.from_recipe(store / RECIPE, max_length=0)
    reader = CacheReader(store / RECIPE, "topk_cache", fields=["topk_ids"])
    with pytest.raises(UnknownFieldError, match="input_ids"):
        TeacherCacheDataset({"topk_cache": reader})


def test_a_batch_is_padded_on_the_right_and_its_masks_leave_padding_out(dataset: TeacherCacheDataset) -> None:
    samples = [dataset[i] for i in range(13)]
    batch = collate(samples)
    n_documents, longest = 13, max(len(s["input_ids"]) for s in samples)
    assert batch["input_ids"].shape == (n_documents, longest)
    assert batch["topk_ids"].shape == (n_documents, longest - 1, 8)
    assert batch[f"hidden_block_{BLOCK}"].shape == (n_documents, longest, HIDDEN_SIZE)
    assert batch["mean_embedding"].shape == (n_documents, HIDDEN_SIZE)
    for i, sample in enumerate(samples):
        n, n_hidden = len(sample["input_ids"]), len(sample[f"hidden_block_{BLOCK}"])
        assert n_hidden == min(n, 12)
        assert torch.equal(batch["input_ids"][i, :n], sample["input_ids"])
        assert batch["attention_mask"][i].tolist() == [j < n for j in range(longest)]
        assert batch["hidden_mask"][i].tolist() == [j < n_hidden for j in range(longest)]
        asked = [j + 1 < n and bool(sample["loss_mask"][j + 1]) for j in range(longest - 1)]
        assert batch["topk_mask"][i].tolist() == asked
        assert not batch["input_ids"][i, n:].any()
        assert not batch["topk_logprobs"][i, n - 1 :].any()


def test_the_page_on_training_has_every_field_of_a_batch(
    dataset: TeacherCacheDataset, drawn: TeacherCacheDataset
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.*)$", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    fields = {re.sub(r"^hidden_block_\d+$", "hidden_block_22", name) for name in collate([dataset[0]])}
    assert fields | set(collate([drawn[0]])) <= listed


def test_documents_are_cut_with_the_rows_about_their_first_tokens(store: Path) -> None:
    whole = TeacherCacheDataset.from_recipe(store / RECIPE)
    short = TeacherCacheDataset.from_recipe(store / RECIPE, max_length=4)
    for i in range(len(whole)):
        sample = short[i]
        n = min(4, len(whole[i]["input_ids"]))
        assert torch.equal(sample["input_ids"], whole[i]["input_ids"][:n])
        assert torch.equal(sample["topk_ids"], whole[i]["topk_ids"][: n - 1])
        assert len(sample[f"hidden_block_{BLOCK}"]) == n
        assert sample["embedded_tokens"].item() == len(whole[i]["input_ids"])


@pytest.fixture
def drawn(tmp_path: Path) -> TeacherCacheDataset:
    """20 random draws of each position besides the top k."""
    commit_caches(tmp_path, "made-up-00000", DOCUMENTS["made-up-00000"], assets=("topk_cache",), draws=20)
    return TeacherCacheDataset.from_recipe(tmp_path / RECIPE, assets=("topk_cache",))


def test_random_draws_come_as_ids_and_counts_padded_with_zeros(drawn: TeacherCacheDataset) -> None:
    reader = drawn.readers["topk_cache"]
    for i in range(len(drawn)):
        sample, document = drawn[i], reader[i]
        ids, counts = sample["sampled_ids"], sample["sampled_counts"]
        assert (ids.dtype, counts.dtype) == (torch.int64, torch.int64)
        assert (
            ids.shape == counts.shape == (len(sample["input_ids"]) - 1, max(document["sampled_ids"].lengths, default=0))
        )
        for j, n in enumerate(document["sampled_ids"].lengths):
            assert ids[j].tolist() == [*document["sampled_ids"][j].tolist(), *[0] * (ids.shape[1] - n)]
            assert counts[j].tolist() == [*document["sampled_counts"][j].tolist(), *[0] * (ids.shape[1] - n)]
            assert counts[j].sum() == 20


def test_a_batch_of_draws_is_padded_to_its_longest_list_and_masked(drawn: TeacherCacheDataset) -> None:
    samples = [drawn[i] for i in range(len(drawn))]
    batch = collate(samples)
    widest = max(sample["sampled_ids"].shape[1] for sample in samples)
    assert len({sample["sampled_ids"].shape[1] for sample in samples}) > 1
    shape = (len(samples), batch["input_ids"].shape[1] - 1, widest)
    for name in ("sampled_ids", "sampled_counts", "sampled_mask"):
        assert batch[name].shape == shape
    for i, sample in enumerate(samples):
        n, s = sample["sampled_ids"].shape
        assert torch.equal(batch["sampled_ids"][i, :n, :s], sample["sampled_ids"])
        assert torch.equal(batch["sampled_counts"][i, :n, :s], sample["sampled_counts"])
        assert batch["sampled_mask"][i].sum() == (sample["sampled_counts"] > 0).sum()
    assert not batch["sampled_ids"][~batch["sampled_mask"]].any()


def test_documents_with_draws_are_cut_like_others(drawn: TeacherCacheDataset) -> None:
    short = TeacherCacheDataset(drawn.readers, max_length=3)
    for i in range(len(drawn)):
        assert torch.equal(short[i]["sampled_ids"], drawn[i]["sampled_ids"][:2])


def test_a_batch_of_documents_of_one_token_predicts_nothing(tmp_path: Path) -> None:
    single = [MadeUpDocument(document_id=f"doc-{i}", input_ids=(i,), loss_mask=(True,)) for i in range(3)]
    commit_caches(tmp_path, "made-up-00000", single, draws=5)
    dataset = TeacherCacheDataset.from_recipe(tmp_path / RECIPE)
    batch = collate([dataset[i] for i in range(3)])
    assert batch["topk_ids"].shape == (3, 0, 8)
    assert batch["topk_mask"].shape == (3, 0)
    assert batch["sampled_ids"].shape == batch["sampled_mask"].shape == (3, 0, 0)
    assert int(batch["input_ids"].max()) < VOCABULARY


# ------------------------------------------------------------------------------------------------- kept positions


KEPT = PositionChoice(kept="learned")


@pytest.fixture
def kept(tmp_path: Path) -> TeacherCacheDataset:
    """The same documents and teacher; the top-k and the hidden states keep the learned positions."""
    for key, documents in DOCUMENTS.items():
        commit_caches(tmp_path / "kept", key, documents, teacher=TEACHER, positions=KEPT)
    return TeacherCacheDataset.from_recipe(tmp_path / "kept" / RECIPE)


def test_rows_of_kept_positions_are_those_of_the_whole_cache(
    dataset: TeacherCacheDataset, kept: TeacherCacheDataset
) -> None:
    for i in range(len(dataset)):
        whole, some = dataset[i], kept[i]
        at = some["topk_positions"]
        assert (at + 1).tolist() == [t for t in range(1, len(whole["input_ids"])) if whole["loss_mask"][t]]
        for name in ("topk_ids", "topk_logprobs", "logsumexp", "target_logprob"):
            assert torch.equal(some[name], whole[name][at])
        for name in hidden_fields(whole):
            assert torch.equal(some[name], whole[name][some["hidden_positions"]])
        assert torch.equal(some["mean_embedding"], whole["mean_embedding"])


@pytest.mark.parametrize("max_length", [None, 1, 2, 5, 1000])
def test_a_batch_of_kept_positions_has_the_same_pairs_of_prediction_and_target(
    dataset: TeacherCacheDataset, kept: TeacherCacheDataset, max_length: int | None
) -> None:
    whole, some = (
        collate([TeacherCacheDataset(data.readers, max_length=max_length)[i] for i in range(len(data))])
        for data in (dataset, kept)
    )
    torch.manual_seed(0)
    outputs_BTV = torch.randn(*whole["input_ids"].shape, 3)
    asked, asked_kept = whole["topk_mask"], some["topk_mask"]
    assert torch.equal(outputs_BTV[:, :-1][asked], at_topk_positions(outputs_BTV[:, :-1], some)[asked_kept])
    assert torch.equal(whole["topk_ids"][asked], some["topk_ids"][asked_kept])
    for name in hidden_fields(whole):
        states = at_hidden_positions(whole[name], some)
        assert torch.equal(states[some["hidden_mask"]], some[name][some["hidden_mask"]])
    assert not some["topk_mask"].numel() or int(some["topk_mask"].sum()) == int(whole["loss_mask"][:, 1:].sum())


def test_caches_that_keep_other_positions_are_joined_document_by_document(
    store: Path, kept: TeacherCacheDataset
) -> None:
    whole = TeacherCacheDataset.from_recipe(store / RECIPE)
    readers: dict[Asset, CacheReader] = {
        "topk_cache": kept.readers["topk_cache"],
        "hidden_state_cache": whole.readers["hidden_state_cache"],
    }
    sample = TeacherCacheDataset(readers)[0]
    assert len(sample[f"hidden_block_{BLOCK}"]) == len(sample["input_ids"]) > len(sample["topk_ids"])
    assert "hidden_positions" not in sample
