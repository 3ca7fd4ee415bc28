"""Sets of token ids: equal ones are equal in every form, and any form can be had again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from typing import Any

import pytest

from kd_assets.contract import TokenIds, TopkParams, decode
from kd_assets.errors import ContractError


def test_any_set_is_the_runs_that_it_is_made_of() -> None:
    choice = random.Random(0)
    for _ in range(200):
        ids = {choice.randrange(40) for _ in range(choice.randrange(1, 40))}
        shuffled = choice.sample(sorted(ids), len(ids))
        found = TokenIds.of(shuffled)
        assert len(found) == len(ids)
        assert [i for i in range(-2, 45) if i in found] == sorted(ids)
        assert found == TokenIds.of(ids)
        cut = found.cut(20)
        assert (cut is None) == all(i >= 20 for i in ids)
        assert cut is None or cut == TokenIds.of(i for i in ids if i < 20)


def test_ids_from_0_on_are_their_number_wherever_they_were_found() -> None:
    assert TokenIds.of(range(7)) == TokenIds.below(7)
    assert TokenIds.of(range(7)).in_identity() == 7
    assert TokenIds.of(range(1, 7)).size_if_whole is None


def test_other_sets_are_named_by_the_hash_of_their_runs() -> None:
    """[F68]"""
    holes = TokenIds.of([0, 1, 2, 9, 5, 6])
    assert holes.to_json() == b"[[0,3],[5,7],[9,10]]\n"
    digest = hashlib.sha256(b"[[0,3],[5,7],[9,10]]\n").hexdigest()
    assert holes.in_identity() == {"n_ids": 6, "sha256": digest}


@pytest.mark.parametrize(
    "runs", [(), ((0, 0),), ((3, 2),), ((0, 3), (3, 5)), ((4, 6), (0, 2)), ((-1, 2),), ((0, 2, 4),), ((0,),)]
)
def test_runs_that_could_be_another_form_of_the_same_set_are_refused(runs: Any) -> None:
    with pytest.raises(ContractError, match="runs"):
        TokenIds(runs=runs)


def test_the_job_file_carries_them_whole() -> None:
    params = TopkParams(k=2, max_length=4, vocabulary="tokenizer", token_ids=TokenIds.of([0, 1, 5]))
    raw = json.loads(json.dumps(dataclasses.asdict(params)))
    assert decode(TopkParams, raw, where="topk") == params
