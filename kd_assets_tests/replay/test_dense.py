"""Answers against the teacher itself: a plain forward pass and log_softmax of every sequence, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from kd_assets.contract import PositionChoice, TokenIds, TopkParams
from kd_assets.replay.cache import ReplayCache, open_cache
from kd_assets.replay.tokens import Tokens
from kd_assets.replay.vllm_protocol import prompt_logprobs_json
from kd_assets.store import plan_output
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

VOCABULARY, K = 64, 8
LENGTHS = [1, 2, 3, 9, 17, 30, 41]


def made(
    folder: Path, positions: PositionChoice, *, cut: TokenIds | None = None
) -> tuple[ReplayCache, list[list[int]]]:
    """`cut`: the token ids that the cache is cut to; documents are of the first 40."""
    teacher = save_teacher(folder / "teacher", vocab_size=VOCABULARY, initializer_range=0.2)
    vocabulary = None if cut is None else "tokenizer"
    topk = TopkParams(k=K, max_length=64, positions=positions, vocabulary=vocabulary, token_ids=cut)
    params = tiny_params(teacher, topk=topk, hidden_states=None, embeddings=None)
    documents = tiny_documents(LENGTHS, vocabulary=VOCABULARY if cut is None else 40)
    learned = np.concatenate([np.arange(n) >= n // 3 for n in LENGTHS])
    documents = dataclasses.replace(documents, loss_mask=learned)
    desk = Desk(folder)
    unit = desk.unit(desk.commit_shard(documents), params, assets=("topk_cache",))
    if cut is not None:
        identity = {**unit.outputs[0].identity, "params": {"k": K, "vocabulary": cut.in_identity()}}
        recipe_folder, key = desk.recipe_folder, unit.partition_key
        output = plan_output("topk_cache", identity, recipe_folder=recipe_folder, partition_key=key)
        unit = dataclasses.replace(unit, outputs=(output,))
    desk.run(params, unit)
    cuts = documents.offsets.tolist()
    ids = [documents.input_ids[start:stop].tolist() for start, stop in itertools.pairwise(cuts)]
    return open_cache(desk.recipe_folder), ids


@torch.no_grad()
def test_every_beginning_has_the_logprobs_and_ranks_that_the_teacher_gives_it_alone(tmp_path: Path) -> None:
    cache, documents = made(tmp_path, PositionChoice())
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    assert "cut to" not in cache.description
    n_outside = 0
    for ids in documents:
        for n in range(1, len(ids) + 1):
            rows = cache.rows(np.array(ids[:n], dtype=np.uint32), first=0, k=K, name="it")
            dense_LV = teacher(input_ids=torch.tensor([ids[:n]])).logits[0].double().log_softmax(-1)
            assert rows.tokens_M.tolist() == list(range(1, n))
            for row, token in enumerate(rows.tokens_M.tolist()):
                of_row_V = dense_LV[token - 1]
                of_target = of_row_V[ids[token]].item()
                assert abs(rows.target_logprob_M[row] - of_target) < 1e-4
                best = of_row_V.topk(K)
                assert sorted(rows.topk_ids_Mk[row].tolist()) == sorted(best.indices.tolist())
                np.testing.assert_allclose(rows.topk_logprobs_Mk[row], best.values.numpy(), rtol=1e-3, atol=1e-4)
                rank = int((of_row_V > of_target).sum()) + 1
                n_outside += rank > K
                said = rows.target_rank_M[row]
                assert said == rank if rank <= K else said == K + 1, "a lower bound, and no guess"
    assert n_outside > 50


def test_a_cache_of_learned_positions_answers_for_completions(tmp_path: Path) -> None:
    cache, documents = made(tmp_path, PositionChoice(kept="learned"))
    whole, _ = made(tmp_path / "whole", PositionChoice())
    for ids in documents:
        sequence = np.array(ids, dtype=np.uint32)
        first = max(len(ids) // 3, 1)
        some, all_of_it = (c.rows(sequence, first=first, k=K, name="it") for c in (cache, whole))
        assert some.tokens_M.tolist() == all_of_it.tokens_M.tolist() == list(range(first, len(ids)))
        said = [prompt_logprobs_json(rows, k=K, tokens=Tokens(None)) for rows in (some, all_of_it)]
        assert said[0] == said[1]


@torch.no_grad()
def test_of_a_cache_cut_to_a_vocabulary_the_whole_distributions_numbers_are_told(tmp_path: Path) -> None:
    cache, documents = made(tmp_path, PositionChoice(), cut=TokenIds.of([*range(45), *range(50, 53)]))
    assert "cut to 48 token ids" in cache.description
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    largest = 0.0
    for ids in documents:
        rows = cache.rows(np.array(ids, dtype=np.uint32), first=0, k=K, name="it")
        said = json.loads(prompt_logprobs_json(rows, k=K, tokens=Tokens(None)))
        dense_LV = teacher(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for token in range(1, len(ids)):
            own, *others = said[token].items()
            assert [other for other in others if "outside_mass" in other[1]] == []
            outside = own[1]["outside_mass"]
            largest = max(largest, outside)
            for token_id, entry in (own, *others):
                whole = dense_LV[token - 1, int(token_id)].item()
                assert abs(entry["logprob"] + math.log1p(-outside) - whole) < 1e-3 * (1 + abs(whole))
    assert largest > 0.1
