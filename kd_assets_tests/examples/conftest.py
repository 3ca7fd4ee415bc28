"""Top-k caches of a real, tiny teacher, made by the pass itself: what the examples train from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kd_assets.contract import TopkParams
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

VOCABULARY = 64
N_SHARDS = 2
DOCUMENTS_OF_A_SHARD = 160


@dataclass(frozen=True)
class Made:
    recipe_folder: Path
    teacher: Path


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Documents of 1 to 49 random tokens, of which the first quarter of each is not to be learned; k = 32 of 64 ids."""
    folder = tmp_path_factory.mktemp("examples")
    # Peaked enough to have something to say, and flat enough for a student of two layers to find out in seconds.
    teacher = save_teacher(folder / "teacher", vocab_size=VOCABULARY, num_hidden_layers=1, initializer_range=0.12)
    desk = Desk(folder)
    params = tiny_params(
        teacher,
        token_budget=2048,
        part_documents=100,
        topk=TopkParams(k=32, max_length=64),
        hidden_states=None,
        embeddings=None,
    )
    for i in range(N_SHARDS):
        key = f"shard-{i:05d}"
        lengths = np.random.default_rng(i).integers(1, 50, DOCUMENTS_OF_A_SHARD)
        learned = np.concatenate([np.arange(n) >= n // 4 for n in lengths])
        documents = tiny_documents(lengths.tolist(), vocabulary=VOCABULARY, seed=i)
        shard = desk.commit_shard(dataclasses.replace(documents, loss_mask=learned), key)
        desk.run(params, desk.unit(shard, params, assets=("topk_cache",), key=key))
    return Made(desk.recipe_folder, teacher)
