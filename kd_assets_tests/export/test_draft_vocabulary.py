"""Draft vocabularies are those that the consumers' own tools make."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kd_assets.errors import RecipeError
from kd_assets.export.draft_vocabulary import count_tokens, draft_vocabulary
from kd_assets_tests.export import made_up


def test_tokens_are_counted_where_they_are_learned_or_everywhere(tmp_path: Path) -> None:
    keys = ("made-up-00000", "made-up-00001")
    documents = [made_up.truths(3, key) for key in keys]
    folders = [made_up.commit(tmp_path, of, assets=("shards_manifest",))["shards_manifest"] for of in documents]
    flat = [document for of in documents for document in of]
    learned = Counter(int(token) for d in flat for token in d.ids_L[d.mask_L])
    everywhere = Counter(int(token) for d in flat for token in d.ids_L[:4])
    assert count_tokens(folders, 50).tolist() == [learned[token] for token in range(50)]
    found = count_tokens(folders, 50, learned_only=False, max_length=4)
    assert found.tolist() == [everywhere[token] for token in range(50)]
    with pytest.raises(RecipeError, match="of another tokenizer"):
        count_tokens(folders, 10)


def test_the_most_frequent_ids_are_kept_and_ties_go_to_the_lower_one() -> None:
    counts = np.zeros(16, dtype=np.int64)
    counts[[5, 3, 9, 1, 7]] = [10, 30, 20, 5, 30]
    vocabulary = draft_vocabulary(counts, 3)
    assert vocabulary.target_ids_D.tolist() == [3, 7, 9]
    assert vocabulary.d2t_D.tolist() == [3, 6, 7]
    assert np.flatnonzero(vocabulary.t2d_V).tolist() == [3, 7, 9]
    counts[:] = 2
    assert draft_vocabulary(counts, 4).target_ids_D.tolist() == [0, 1, 2, 3]


def test_ids_that_were_never_seen_fill_a_draft_vocabulary_from_the_lowest_on() -> None:
    counts = np.zeros(16, dtype=np.int64)
    counts[[2, 10]] = [7, 3]
    assert draft_vocabulary(counts, 4).target_ids_D.tolist() == [0, 1, 2, 10]
    with pytest.raises(RecipeError, match="a draft vocabulary of 17 tokens"):
        draft_vocabulary(counts, 17)
