"""Training loaders over committed caches: exact epochs, going on anywhere, batches that losses take as they are."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets.contract import CACHES, PositionChoice
from kd_assets.errors import CorruptPartError, LoaderStateError, RecipeError
from kd_assets.store.partfile import PartFile
from kd_assets.student.dataset import TeacherCacheDataset, at_hidden_positions, at_topk_positions, collate
from kd_assets.student.loading import TrainingLoader, packed_batch, padded_batch
from kd_assets.student.losses import cross_entropy_loss, response_loss
from kd_assets_tests.store.examples import flip_byte
from kd_assets_tests.student.damaged_states import damaged
from kd_assets_tests.student.made_up import RECIPE, VOCABULARY, BigramTeacher, commit_caches, made_up_documents

N_DOCUMENTS = 46
KEYS = ("made-up-00000", "made-up-00001", "made-up-00002")
LONGEST = 20
POSITIONS = {"all": PositionChoice(), "learned": PositionChoice(kept="learned")}


@pytest.fixture(scope="module", params=["all", "learned"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TeacherCacheDataset:
    """Three partitions of short documents, with draws; of each cache all positions, or the learned ones."""
    store = tmp_path_factory.mktemp("store")
    documents = made_up_documents(N_DOCUMENTS, seed=3, longest=LONGEST)
    for i, key in enumerate(KEYS):
        commit_caches(store, key, documents[i * 16 : (i + 1) * 16], draws=5, positions=POSITIONS[request.param])
    return TeacherCacheDataset.from_recipe(store / RECIPE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TeacherCacheDataset:
    """The top-k of the same documents alone."""
    store = tmp_path_factory.mktemp("plain")
    documents = made_up_documents(N_DOCUMENTS, seed=3, longest=LONGEST)
    for i, key in enumerate(KEYS):
        commit_caches(store, key, documents[i * 16 : (i + 1) * 16], assets=["topk_cache"])
    return TeacherCacheDataset.from_recipe(store / RECIPE, assets=["topk_cache"])


def ids_of(batch: dict[str, Any]) -> list[str]:
    ids = batch["document_id"]
    return [i for row in ids for i in row] if ids and isinstance(ids[0], list) else list(ids)


def taken(loader: TrainingLoader, n_steps: int) -> list[str]:
    """The ids of the next steps; the iteration is left as a training that is killed leaves it."""
    ids: list[str] = []
    for step, batch in enumerate(loader, start=1):
        ids += ids_of(batch)
        if step == n_steps:
            break
    return ids


def all_ids() -> Counter[str]:
    return Counter(f"doc-{i}" for i in range(N_DOCUMENTS))


def test_a_padded_batch_is_what_collate_makes(dataset: TeacherCacheDataset) -> None:
    for chosen in ([0, 5, 3], [7], list(range(len(dataset)))):
        found, expected = padded_batch(dataset.documents(chosen)), collate([dataset[i] for i in chosen])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype, name
                assert torch.equal(found[name], value), name
            else:
                assert found[name] == value


def test_a_padded_batch_of_cut_documents_is_what_collate_makes(dataset: TeacherCacheDataset) -> None:
    cut = TeacherCacheDataset(dataset.readers, max_length=7)
    assert cut.n_tokens_D.max() == 7
    found, expected = padded_batch(cut.documents(range(9))), collate([cut[i] for i in range(9)])
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def random_rows(dataset: TeacherCacheDataset, length: int) -> list[list[int]]:
    rng = random.Random(length)
    rows: list[list[int]] = [[]]
    for i in rng.sample(range(len(dataset)), len(dataset)):
        if sum(int(dataset.n_tokens_D[j]) for j in (*rows[-1], i)) > length:
            rows.append([])
        rows[-1].append(i)
    return rows


@pytest.mark.parametrize("length", [20, 33, 64])
def test_a_packed_row_holds_each_document_as_a_row_of_its_own_would(dataset: TeacherCacheDataset, length: int) -> None:
    rows = random_rows(dataset, length)
    batch = packed_batch([dataset.documents(row) for row in rows], length)
    assert batch["input_ids"].shape == (len(rows), length)
    assert batch["topk_mask"].shape[0] == len(rows)
    places = zip(*(batch[f"document_{name}"].tolist() for name in ("rows", "starts", "lengths")), strict=True)
    chosen = [i for documents in rows for i in documents]
    seen_topk, seen_hidden = torch.zeros_like(batch["topk_mask"]), torch.zeros_like(batch["hidden_mask"])
    for (row, start, n), i in zip(places, chosen, strict=True):
        alone = collate([dataset[i]])
        place = slice(start, start + n)
        assert torch.equal(batch["input_ids"][row, place], alone["input_ids"][0])
        assert torch.equal(batch["position_ids"][row, place], torch.arange(n))
        assert batch["segment_ids"][row, place].unique().tolist() == [rows[row].index(i) + 1]
        assert batch["attention_mask"][row, place].all()
        assert torch.equal(batch["loss_mask"][row, start + 1 : start + n], alone["loss_mask"][0, 1:])
        assert not batch["loss_mask"][row, start]
        for kind, seen, fields in (
            ("topk", seen_topk, ("topk_ids", "topk_logprobs", "logsumexp", "target_logprob", "sampled_ids")),
            ("hidden", seen_hidden, ("hidden_block_3",)),
        ):
            positions = alone.get(f"{kind}_positions", torch.arange(alone[fields[0]].shape[1])[None])[0]
            kept = batch.get(f"{kind}_positions")
            if kept is None:
                rows_of_field = start + positions
            else:
                of_all = [j for other in rows[row][: rows[row].index(i)] for j in [len(dataset[other][fields[0]])]]
                rows_of_field = torch.arange(len(positions)) + sum(of_all)
                assert torch.equal(kept[row, rows_of_field], positions + start)
            for name in fields:
                found = batch[name][row, rows_of_field]
                width = alone[name].shape[2] if alone[name].ndim > 2 else None
                assert torch.equal(found if width is None else found[:, :width], alone[name][0]), name
            assert torch.equal(batch[f"{kind}_mask"][row, rows_of_field], alone[f"{kind}_mask"][0])
            seen[row, rows_of_field] = True
    assert not (batch["topk_mask"] & ~seen_topk).any()
    assert not (batch["hidden_mask"] & ~seen_hidden).any()
    assert batch["mean_embedding"].shape[0] == sum(map(len, rows))


def test_a_packed_row_asks_for_no_prediction_across_documents(dataset: TeacherCacheDataset) -> None:
    """The teacher itself as the student: with the rows of one document off, its loss would not be zero."""
    logits_VV = BigramTeacher().logits_VV
    rows = random_rows(dataset, 64)
    batch = packed_batch([dataset.documents(row) for row in rows], 64)
    logits = logits_VV[batch["input_ids"]]

    def loss_of(logits: torch.Tensor) -> float:
        wanted = at_topk_positions(logits[:, :-1], batch)
        return float(response_loss(wanted, batch["topk_ids"], batch["topk_logprobs"], batch["topk_mask"]))

    assert loss_of(logits) < 1e-5
    assert loss_of(logits.roll(1, 1)) > 0.5
    crosses = batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    learned = (batch["attention_mask"] & batch["loss_mask"])[:, 1:]
    assert not (learned & crosses).any()
    states = BigramTeacher().states_VH[batch["input_ids"]].bfloat16()
    kept = batch["hidden_mask"]
    assert torch.equal(
        at_hidden_positions(states[:, :], batch)[:, : kept.shape[1]][kept], batch["hidden_block_3"][kept]
    )


def test_losses_of_packed_rows_are_those_of_the_padded_documents(plain: TeacherCacheDataset) -> None:
    student_VV = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))
    rows = random_rows(plain, 40)
    packed = packed_batch([plain.documents(row) for row in rows], 40)
    padded = padded_batch(plain.documents([i for row in rows for i in row]))
    losses = []
    for batch in (packed, padded):
        logits = student_VV[batch["input_ids"]][:, :-1]
        kd = response_loss(logits, batch["topk_ids"], batch["topk_logprobs"], batch["topk_mask"])
        ce = cross_entropy_loss(
            logits, batch["input_ids"][:, 1:], (batch["attention_mask"] & batch["loss_mask"])[:, 1:]
        )
        losses.append((kd.item(), ce.item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_student_of_transformers_keeps_packed_documents_apart(plain: TeacherCacheDataset) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    row = [0, 1, 2]
    batch = packed_batch([plain.documents(row)], 64)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for start, n, i in zip(batch["document_starts"].tolist(), batch["document_lengths"].tolist(), row, strict=True):
            alone = model(input_ids=plain[i]["input_ids"][None], use_cache=False).logits[0]
            assert torch.allclose(packed[start : start + n], alone, atol=1e-5)


@pytest.mark.parametrize("pack_to", [None, 32])
@pytest.mark.parametrize("n_ranks", [1, 3])
@pytest.mark.parametrize("shuffle", ["windows", "documents", "none"])
def test_every_document_is_seen_once_an_epoch_by_all_ranks_together(
    plain: TeacherCacheDataset, pack_to: int | None, n_ranks: int, shuffle: Any
) -> None:
    loaders = [
        TrainingLoader(plain, batch_size=2, pack_to=pack_to, shuffle=shuffle, num_workers=0, rank=rank, n_ranks=n_ranks)
        for rank in range(n_ranks)
    ]
    epochs = []
    for epoch in range(3):
        assert [loader.epoch for loader in loaders] == [epoch] * n_ranks
        steps = {len(loader) for loader in loaders}
        seen = [[ids_of(batch) for batch in loader] for loader in loaders]
        assert {len(batches) for batches in seen} == steps
        assert Counter(i for batches in seen for ids in batches for i in ids) == all_ids()
        epochs.append(json.dumps(seen))
    assert len(set(epochs)) == (1 if shuffle == "none" else 3)


def test_a_training_goes_on_after_what_it_was_given_however_far_the_workers_are(plain: TeacherCacheDataset) -> None:
    """Workers have the next eight batches ready when the state is saved; a whole run is the yardstick."""
    whole = [ids_of(batch) for batch in TrainingLoader(plain, batch_size=3, num_workers=2, seed=5)]
    for n_steps in (1, 5, len(whole) - 1, len(whole)):
        loader = TrainingLoader(plain, batch_size=3, num_workers=2, prefetch_factor=4, seed=5)
        iterator = iter(loader)
        for _ in range(n_steps):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        del iterator
        again = TrainingLoader(plain, batch_size=3, num_workers=2, seed=5)
        again.load_state_dict(state)
        if n_steps == len(whole):
            assert (again.epoch, len(again)) == (1, len(whole))
        else:
            assert [ids_of(batch) for batch in again] == whole[n_steps:]
            assert again.epoch == 1


@pytest.mark.parametrize("pack_to", [None, 30])
def test_whatever_changes_between_save_and_load_no_document_is_lost_or_seen_twice(
    plain: TeacherCacheDataset, pack_to: int | None
) -> None:
    """Ranks, workers and rows of a batch change at every interrupt, over several epochs."""
    rng = random.Random(pack_to or 0)
    for _ in range(2):
        state: dict[str, Any] | None = None
        seen: dict[int, Counter[str]] = {}
        while state is None or state["epoch"] < 2:
            n_ranks, n_workers, size = rng.choice((1, 2, 3)), rng.choice((0, 1, 2)), rng.randrange(1, 5)
            n_steps, states = rng.randrange(1, 9), []
            for rank in range(n_ranks):
                loader = TrainingLoader(
                    plain, batch_size=size, pack_to=pack_to, num_workers=n_workers, seed=1, rank=rank, n_ranks=n_ranks
                )
                try:
                    loader.load_state_dict(state or loader.state_dict())
                except RecipeError:  # fewer rows are left than there are ranks: it takes fewer
                    break
                epoch = loader.epoch
                seen.setdefault(epoch, Counter()).update(taken(loader, n_steps))
                states.append(json.dumps(loader.state_dict()))
            else:
                assert len(set(states)) == 1
                state = json.loads(states[0])
        assert seen[0] == seen[1] == all_ids()


def test_an_iteration_that_is_left_goes_on_in_the_next_one(plain: TeacherCacheDataset) -> None:
    loader = TrainingLoader(plain, batch_size=4, num_workers=1)
    first = taken(loader, 3)
    rest = [i for batch in loader for i in ids_of(batch)]
    assert Counter(first + rest) == all_ids()
    assert loader.epoch == 1


def test_an_iteration_that_another_one_took_over_from_is_refused(plain: TeacherCacheDataset) -> None:
    loader = TrainingLoader(plain, batch_size=4, num_workers=0)
    old = iter(loader)
    next(old)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="the loader went elsewhere since this iteration began"):
        next(old)


def test_nothing_is_read_in_the_training_process(plain: TeacherCacheDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, read_group, init = os.getpid(), PartFile.read_group, PartFile.__init__

    def refused_there(self: PartFile, *arguments: Any) -> Any:
        assert os.getpid() != trainer, "decoded in the training process"
        return read_group(self, *arguments)

    def opened(self: PartFile, *arguments: Any, **named: Any) -> None:
        assert os.getpid() != trainer, "a part was opened in the training process"
        init(self, *arguments, **named)

    monkeypatch.setattr(PartFile, "read_group", refused_there)
    monkeypatch.setattr(PartFile, "__init__", opened)
    loader = TrainingLoader(plain, batch_size=4, pack_to=32, num_workers=1)
    assert Counter(i for batch in loader for i in ids_of(batch)) == all_ids()


def test_drop_last_gives_whole_batches_only(plain: TeacherCacheDataset) -> None:
    loaders = [
        TrainingLoader(plain, batch_size=4, drop_last=True, num_workers=0, rank=rank, n_ranks=2) for rank in (0, 1)
    ]
    sizes = [[len(ids_of(batch)) for batch in loader] for loader in loaders]
    assert sizes == [[4] * 5] * 2


def changed(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    yield state | {"version": 2}, "a loader's state has version 1, found 2"
    yield {}, "a loader's state has version 1, found None"
    yield {"version": 1}, "this is no state of a loader"
    yield state | {"order": state["order"] | {"seed": 9}}, "the state is of Order.seed=9"
    yield state | {"order": state["order"] | {"pack_to": 99}}, "make the loader as the one that saved it"
    yield state | {"documents_sha256": "0" * 64}, "the state is of other documents than the loader's"
    segment = state["segments"][0]
    yield state | {"segments": [segment | {"n_steps": 999}]}, "it was changed"
    yield state | {"segments": [segment | {"n_steps": 999}, segment]}, "it was changed"
    yield state | {"segments": [segment | {"n_steps": -1}]}, "n_steps is -1"
    yield state | {"epoch": -1}, "epoch is -1"
    yield state | {"segments": [segment | {"shares": segment["shares"] | {"n_workers": 10**12}}]}, "it can be at most"
    yield state | {"segments": [segment | {"shares": segment["shares"] | {"batch_size": 0}}]}, "batch_size is 0"


@pytest.mark.parametrize("pack_to", [None, 32])
def test_a_damaged_state_is_refused_by_name_or_says_where_a_training_can_have_been(
    plain: TeacherCacheDataset, pack_to: int | None
) -> None:
    loader = TrainingLoader(plain, batch_size=2, pack_to=pack_to, num_workers=0, rank=0, n_ranks=2)
    taken(loader, 2)
    other = TrainingLoader(plain, batch_size=2, pack_to=pack_to, num_workers=0)
    other.load_state_dict(loader.state_dict())
    taken(other, 2)
    state = json.loads(json.dumps(other.state_dict()))
    assert len(state["segments"]) == 2
    for raw in damaged(state):
        try:
            other.load_state_dict(raw)
        except LoaderStateError:
            assert other.state_dict() == state, raw
            continue
        # What is accepted is a place within an epoch of these documents.
        said = other.state_dict()
        assert said["epoch"] >= 0
        assert all(segment["n_steps"] > 0 for segment in said["segments"])
        assert len(other) > 0, raw
        other.load_state_dict(state)


def test_a_state_that_is_not_of_this_loader_is_refused_and_the_loader_stays_where_it_is(
    plain: TeacherCacheDataset,
) -> None:
    loader = TrainingLoader(plain, batch_size=4, num_workers=0)
    taken(loader, 2)
    state = loader.state_dict()
    for raw, message in changed(state):
        with pytest.raises(LoaderStateError, match=message):
            loader.load_state_dict(raw)
        assert loader.state_dict() == state
    other = TrainingLoader(TeacherCacheDataset(plain.readers, max_length=5), batch_size=4, num_workers=0)
    with pytest.raises(LoaderStateError, match="of other documents"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "num_workers": -1}, "num_workers is -1"),
        ({"batch_size": 1, "rank": 2, "n_ranks": 2}, "rank is 2, of 2 ranks"),
        ({"batch_size": 1, "pack_to": 0}, "pack_to is 0"),
        ({"batch_size": 1, "pack_to": 5}, "documents are longer than a packed row of 5 tokens"),
        ({"batch_size": 1, "shuffle": "yes"}, "shuffle must be windows, documents or none"),
        ({"batch_size": 1, "rank": 0, "n_ranks": 99}, "46 documents or rows are left of the epoch, for 99 ranks"),
    ],
)
def test_loaders_that_cannot_be_are_refused(plain: TeacherCacheDataset, options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainingLoader(plain, **options)


def test_documents_come_by_any_index_and_a_row_that_is_not_there_is_an_error(plain: TeacherCacheDataset) -> None:
    rows = [45, 0, 17, 17]
    found = plain.documents(rows)
    assert [document["document_id"] for document in found] == [f"doc-{i}" for i in rows]
    for i, document in zip(rows, found, strict=True):
        assert np.array_equal(document["input_ids"], plain[i]["input_ids"].numpy())
    with pytest.raises(IndexError):
        plain.documents([46])


def test_all_caches_give_lengths_of_the_longest(dataset: TeacherCacheDataset) -> None:
    assert dataset.n_tokens_D.tolist() == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert set(dataset.readers) == set(CACHES)


def test_a_loader_is_made_from_a_path_of_a_recipe(tmp_path: Path) -> None:
    commit_caches(tmp_path, KEYS[0], made_up_documents(5), assets=["topk_cache"])
    dataset = TeacherCacheDataset.from_recipe(tmp_path / RECIPE, assets=["topk_cache"])
    assert sum(len(ids_of(batch)) for batch in TrainingLoader(dataset, batch_size=2, num_workers=1)) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bit_that_flipped_is_named_and_no_batch_has_it(tmp_path: Path, num_workers: int) -> None:
    folders = commit_caches(tmp_path, KEYS[0], made_up_documents(5), assets=["topk_cache"])
    dataset = TeacherCacheDataset.from_recipe(tmp_path / RECIPE, assets=["topk_cache"])
    loader = TrainingLoader(dataset, batch_size=1, shuffle="none", num_workers=num_workers)
    flip_byte(sorted(folders["topk_cache"].glob("part-*"))[1])
    with pytest.raises(CorruptPartError, match=r"part-00001\.parquet was changed after its commit"):
        taken(loader, 5)
    assert taken_before(loader) == 2


def taken_before(loader: TrainingLoader) -> int:
    """The steps that a loader's state has."""
    return sum(segment["n_steps"] for segment in loader.state_dict()["segments"])


def test_all_caches_together_are_kept_decoded_within_a_bound_and_small_ones_have_what_they_want(
    dataset: TeacherCacheDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, int] = {}
    for asset, reader in dataset.readers.items():
        monkeypatch.setattr(reader, "keep_decoded", lambda n_bytes, asset=asset: given.update({asset: n_bytes}))

    wanted = {
        asset: 1000 * sum(m.n_bytes for m in reader.manifests) // sum(m.n_tokens for m in reader.manifests)
        for asset, reader in dataset.readers.items()
    }
    dataset.keep_decoded(tokens=1000, per_stored_byte=1)
    assert given == wanted, "far below the bound each has all it wants"
    dataset.keep_decoded(tokens=1 << 40, per_stored_byte=1)
    assert sum(given.values()) <= 1 << 30
    assert min(given.values()) >= (1 << 30) // 3
