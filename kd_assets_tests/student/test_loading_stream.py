"""The iterable data set: under torch's plain DataLoader, and under torchdata's stateful one where it is installed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from kd_assets.errors import LoaderStateError, RecipeError
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets.student.loading import TeacherCacheStream, TrainingLoader
from kd_assets_tests.student.damaged_states import damaged, is_same
from kd_assets_tests.student.made_up import RECIPE, commit_caches, made_up_documents

N_DOCUMENTS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TeacherCacheDataset:
    store = tmp_path_factory.mktemp("store")
    documents = made_up_documents(N_DOCUMENTS, seed=3)
    for i, key in enumerate(("made-up-00000", "made-up-00001")):
        commit_caches(store, key, documents[i * 15 : (i + 1) * 15], assets=["topk_cache"])
    return TeacherCacheDataset.from_recipe(store / RECIPE, assets=["topk_cache"])


def ids_of(batch: dict[str, Any]) -> list[str]:
    ids = batch["document_id"]
    return [i for row in ids for i in row] if isinstance(ids[0], list) else list(ids)


def seen_by(loader: Any) -> list[list[str]]:
    return [ids_of(batch) for batch in loader]


ALL = Counter(f"doc-{i}" for i in range(N_DOCUMENTS))


@pytest.mark.parametrize("pack_to", [None, 24])
@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_ranks_and_workers_together_give_every_document_once_an_epoch(
    dataset: TeacherCacheDataset, n_workers: int, pack_to: int | None
) -> None:
    orders = []
    for epoch in (0, 1):
        seen = []
        for rank in (0, 1):
            stream = TeacherCacheStream(dataset, batch_size=2, pack_to=pack_to, rank=rank, n_ranks=2)
            stream.set_epoch(epoch)
            loader = DataLoader(stream, batch_size=None, num_workers=n_workers)
            seen += seen_by(loader)
            assert seen_by(loader) == seen[-len(seen_by(loader)) :]  # again the same epoch
        assert Counter(i for ids in seen for i in ids) == ALL
        orders.append(seen)
    assert orders[0] != orders[1]


def test_a_stream_gives_what_the_training_loader_gives(dataset: TeacherCacheDataset) -> None:
    stream = TeacherCacheStream(dataset, batch_size=3, seed=4)
    loader = TrainingLoader(dataset, batch_size=3, seed=4, num_workers=2)
    assert seen_by(DataLoader(stream, batch_size=None, num_workers=2)) == seen_by(loader)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("pack_to", [None, 24])
def test_torchdatas_stateful_loader_goes_on_after_what_it_gave(
    dataset: TeacherCacheDataset, n_workers: int, pack_to: int | None
) -> None:
    torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")

    def new_loader() -> Any:
        stream = TeacherCacheStream(dataset, batch_size=2, seed=1, pack_to=pack_to)
        return torchdata.StatefulDataLoader(stream, batch_size=None, num_workers=n_workers)

    whole = seen_by(new_loader())
    assert Counter(i for ids in whole for i in ids) == ALL
    for n_steps in range(1, len(whole)):
        loader = new_loader()
        iterator = iter(loader)
        for _ in range(n_steps):
            next(iterator)
        state = loader.state_dict()
        del iterator
        again = new_loader()
        again.load_state_dict(state)
        assert seen_by(again) == whole[n_steps:], n_steps


def epochs_of(loader: Any, stream: TeacherCacheStream, epochs: list[int]) -> list[list[list[str]]]:
    seen = []
    for epoch in epochs:
        stream.set_epoch(epoch)
        seen.append(seen_by(loader))
    return seen


def one_by_one(dataset: TeacherCacheDataset, epochs: list[int]) -> list[list[list[str]]]:
    """What a new loader gives of each epoch."""
    return [
        epochs_of(DataLoader(stream, batch_size=None, num_workers=2), stream, [epoch])[0]
        for epoch in epochs
        for stream in [TeacherCacheStream(dataset, batch_size=2, seed=1)]
    ]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_that_stay_give_each_epoch_its_own_order(dataset: TeacherCacheDataset, start: str) -> None:
    stream = TeacherCacheStream(dataset, batch_size=2, seed=1)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=start)
    epochs = [0, 1, 2, 0, 0]
    seen = epochs_of(loader, stream, epochs)
    assert seen == one_by_one(dataset, epochs)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("says_epoch", [True, False])
def test_torchdatas_stateful_loader_goes_on_in_a_later_epoch_with_workers_that_stay(
    dataset: TeacherCacheDataset, n_workers: int, says_epoch: bool
) -> None:
    torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")

    def new_loader() -> tuple[Any, TeacherCacheStream]:
        stream = TeacherCacheStream(dataset, batch_size=2, seed=1)
        options: Any = {"batch_size": None, "num_workers": n_workers, "persistent_workers": n_workers > 0}
        return torchdata.StatefulDataLoader(stream, **options), stream

    loader, stream = new_loader()
    whole = epochs_of(loader, stream, [0, 1, 2])
    assert len({str(epoch) for epoch in whole}) == 3
    for n_steps in (0, 1, 4, len(whole[1]) - 1):
        loader, stream = new_loader()
        epochs_of(loader, stream, [0])
        stream.set_epoch(1)
        iterator = iter(loader)
        for _ in range(n_steps):
            next(iterator)
        state = loader.state_dict()
        del iterator
        loader, stream = new_loader()
        loader.load_state_dict(state)
        if says_epoch:
            stream.set_epoch(1)
        assert seen_by(loader) == whole[1][n_steps:], n_steps
        assert epochs_of(loader, stream, [2, 1]) == [whole[2], whole[1]]


def test_the_epoch_that_a_loaded_state_is_of_may_be_set_again(dataset: TeacherCacheDataset) -> None:
    stream = TeacherCacheStream(dataset, batch_size=4)
    stream.set_epoch(2)
    whole = seen_by(stream)
    iterator = iter(stream)
    next(iterator), next(iterator)
    state = stream.state_dict()
    again = TeacherCacheStream(dataset, batch_size=4)
    again.load_state_dict(state)
    again.set_epoch(2)
    assert again.state_dict() == state
    assert seen_by(again) == whole[2:]
    again.load_state_dict(state)
    again.set_epoch(3)
    assert again.state_dict() == state | {"epoch": 3, "n_given": 0}
    assert Counter(i for ids in seen_by(again) for i in ids) == ALL


def test_an_epoch_that_is_set_within_an_iteration_is_that_of_the_next_one(dataset: TeacherCacheDataset) -> None:
    stream = TeacherCacheStream(dataset, batch_size=4)
    whole = epochs_of(stream, stream, [0, 1])
    stream.set_epoch(0)
    iterator = iter(stream)
    seen = [ids_of(next(iterator))]
    stream.set_epoch(1)
    seen += [ids_of(batch) for batch in iterator]
    assert stream.state_dict() | {"epoch": 1, "n_given": 0} == stream.state_dict()
    assert [seen, seen_by(stream)] == whole


def test_a_stream_goes_on_from_its_state(dataset: TeacherCacheDataset) -> None:
    whole = seen_by(TeacherCacheStream(dataset, batch_size=4))
    stream = TeacherCacheStream(dataset, batch_size=4)
    iterator = iter(stream)
    next(iterator), next(iterator)
    again = TeacherCacheStream(dataset, batch_size=4)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert seen_by(again) == whole[2:]
    assert seen_by(again) == whole


def test_a_stream_that_is_made_with_numbers_of_numpy_has_a_state_of_json(dataset: TeacherCacheDataset) -> None:
    numbers: Any = {name: np.int64(4) for name in ("batch_size", "seed")} | {"pack_to": np.int32(24)}
    stream = TeacherCacheStream(dataset, **numbers)
    stream.load_state_dict(json.loads(json.dumps(stream.state_dict())))


def test_a_state_of_another_stream_is_refused(dataset: TeacherCacheDataset) -> None:
    stream = TeacherCacheStream(dataset, batch_size=4)
    state = stream.state_dict()
    for name, value in {"seed": 9, "n_workers": 3, "documents_sha256": "", "batch_size": 5, "rank": 1}.items():
        with pytest.raises(LoaderStateError, match=f"the state has {name} {value!r}, this stream"):
            stream.load_state_dict(state | {name: value})
    with pytest.raises(LoaderStateError, match="the state has stream_version None"):
        stream.load_state_dict({})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"n_given": -1}, "n_given is -1: expected 0 to 8"),
        ({"n_given": 9}, "n_given is 9: expected 0 to 8"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": "0"}, "epoch: expected int, found '0'"),
        ({"drop_last": 0}, "the state has drop_last 0, this stream False"),
        ({"other": 1}, "unknown field 'other'"),
    ],
)
def test_a_state_that_was_changed_is_refused_and_the_stream_stays_where_it_is(
    dataset: TeacherCacheDataset, harm: dict[str, Any], message: str
) -> None:
    stream = TeacherCacheStream(dataset, batch_size=4)
    state = stream.state_dict()
    with pytest.raises(LoaderStateError, match=message):
        stream.load_state_dict(state | harm)
    assert stream.state_dict() == state


@pytest.mark.parametrize("pack_to", [None, 24])
def test_a_damaged_state_is_refused_by_name_unless_it_is_another_place_of_the_same_epochs(
    dataset: TeacherCacheDataset, pack_to: int | None
) -> None:
    stream = TeacherCacheStream(dataset, batch_size=4, pack_to=pack_to)
    stream.set_epoch(1)
    iterator = iter(stream)
    next(iterator), next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["n_given"] == 2
    for raw in damaged(state):
        try:
            stream.load_state_dict(raw)
        except LoaderStateError:
            assert stream.state_dict() == state, raw
        else:
            assert is_same(raw, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "rank": 1}, "rank is 1, of 1 ranks"),
        ({"batch_size": 1, "n_ranks": 2**21}, "n_ranks x n_workers is 2097152"),
        ({"batch_size": 1, "pack_to": 2}, "documents are longer than a packed row of 2 tokens"),
    ],
)
def test_streams_that_cannot_be_are_refused(dataset: TeacherCacheDataset, options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TeacherCacheStream(dataset, **options)


def test_an_epoch_below_0_is_refused(dataset: TeacherCacheDataset) -> None:
    with pytest.raises(RecipeError, match="epoch is -1: expected 0 or more"):
        TeacherCacheStream(dataset, batch_size=1).set_epoch(-1)
