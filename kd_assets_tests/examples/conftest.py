"""Top-k caches of a real, tiny teacher, made by the pass itself: what the examples train from."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kd_assets.contract import PositionChoice, TopkParams
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

VOCABULARY = 64
N_SHARDS = 2
DOCUMENTS_OF_A_SHARD = 160


@dataclass(frozen=True)
class Made:
    recipe_folder: Path
    teacher: Path


def first_quarter_is_not(n_tokens: int) -> npt.NDArray[np.bool_]:
    return np.arange(n_tokens) >= n_tokens // 4


@pytest.fixture(autouse=True)
def sockets_of_clients_are_let_go() -> Iterator[None]:
    """TRL's client leaves its socket open, and Python tells of it in whichever test comes next."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Documents of 1 to 49 random tokens, of which the first quarter of each is not to be learned; k = 32 of 64 ids."""
    return made_at(tmp_path_factory.mktemp("examples"))


def made_at(
    folder: Path,
    *,
    documents_of_a_shard: int = DOCUMENTS_OF_A_SHARD,
    positions: PositionChoice = PositionChoice(),  # noqa: B008 - frozen
    learned: Callable[[int], npt.NDArray[np.bool_]] = first_quarter_is_not,
) -> Made:
    """`learned`: the mask of a document of so many tokens."""
    # Peaked enough to have something to say, and flat enough for a student of two layers to find out in seconds.
    teacher = save_teacher(folder / "teacher", vocab_size=VOCABULARY, num_hidden_layers=1, initializer_range=0.12)
    desk = Desk(folder)
    params = tiny_params(
        teacher,
        token_budget=2048,
        part_documents=100,
        topk=TopkParams(k=32, max_length=64, positions=positions),
        hidden_states=None,
        embeddings=None,
    )
    for i in range(N_SHARDS):
        key = f"shard-{i:05d}"
        lengths = np.random.default_rng(i).integers(1, 50, documents_of_a_shard)
        documents = tiny_documents(lengths.tolist(), vocabulary=VOCABULARY, seed=i)
        mask = np.concatenate([learned(int(n)) for n in lengths])
        shard = desk.commit_shard(dataclasses.replace(documents, loss_mask=mask), key)
        desk.run(params, desk.unit(shard, params, assets=("topk_cache",), key=key))
    return Made(desk.recipe_folder, teacher)
