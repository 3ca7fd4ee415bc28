"""Answers are the cache's own numbers, of every beginning of every document, in every protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kd_assets.replay.answering import COMPLETIONS, SEQUENCE_LOGPROBS
from kd_assets.replay.tokens import Tokens, open_tokens
from kd_assets.store import CacheReader
from kd_assets_tests.export import made_up
from kd_assets_tests.replay.desks import KEYS, arrays, asked, asked_of, expected_positions, prefixes, with_ids


@pytest.mark.parametrize("seed", range(3))
def test_prompt_logprobs_of_every_beginning_are_the_documents_own(tmp_path: Path, seed: int) -> None:
    desk = asked(tmp_path, seed=seed)
    there = list(prefixes(desk.truths))
    assert len(there) > 100
    for k in (0, 1, 5):
        for first in range(0, len(there), 50):
            some = there[first : first + 50]
            said = desk.completions([truth.ids_L[:n].tolist() for truth, n in some], k)
            for choice, (truth, n) in zip(said["choices"], some, strict=True):
                assert choice["prompt_logprobs"] == expected_positions(truth, n, k)


def test_an_answer_is_what_a_reader_of_the_cache_reads(tmp_path: Path) -> None:
    desk = asked(tmp_path)
    reader = CacheReader(desk.recipe_folder, "topk_cache")
    for i in range(len(reader)):
        document = reader[i]
        said = desk.completions(document["input_ids"].tolist(), 5)["choices"][0]["prompt_logprobs"]
        assert len(said) == len(document["input_ids"])
        for row, position in enumerate(said[1:]):
            of_row = dict(zip(document["topk_ids"][row], document["topk_logprobs"][row], strict=True))
            assert {int(i): entry["logprob"] for i, entry in position.items() if int(i) in of_row} == of_row
            if (target := int(document["input_ids"][row + 1])) not in of_row:
                assert position[str(target)]["logprob"] == document["target_logprob"][row]


def test_the_prompts_own_token_comes_first_and_numbers_fall_with_ranks(tmp_path: Path) -> None:
    desk = asked(tmp_path, k=20)
    for truth in desk.truths:
        for position in desk.completions(truth.ids_L.tolist(), 20)["choices"][0]["prompt_logprobs"][1:]:
            own, *others = position.values()
            assert [entry["rank"] for entry in others] == sorted(entry["rank"] for entry in others)
            known = sorted((own, *others), key=lambda entry: entry["rank"])[:20]
            assert [entry["logprob"] for entry in known] == sorted((e["logprob"] for e in known), reverse=True)
            assert len(position) == 20 + ("rank_is_lower_bound" in own)


def test_an_answer_has_the_shape_of_vllms(tmp_path: Path) -> None:
    desk = asked(tmp_path)
    ids = desk.truths[4].ids_L.tolist()
    said = desk.completions([ids, ids[:1]], 2, model="made-up", user="someone", top_p=0.9, seed=3)
    assert said["object"] == "text_completion"
    assert said["model"] == "made-up"
    n = len(ids) + 1
    assert said["usage"] == {
        "prompt_tokens": n,
        "completion_tokens": 0,
        "total_tokens": n,
        "prompt_tokens_details": None,
    }
    first, second = said["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert (first["text"], first["finish_reason"], first["logprobs"]) == ("", "length", None)
    assert second["prompt_logprobs"] == [None], "of the first token nothing is known"
    with_ids = desk.completions(ids, 2, return_token_ids=True)["choices"][0]
    assert (with_ids["prompt_token_ids"], with_ids["token_ids"]) == (ids, [])


def test_a_model_is_called_by_the_recipes_name_and_by_the_teachers(tmp_path: Path) -> None:
    for teacher, known in (("org/teacher", ("made-up", "org/teacher")), ("/models/teacher", ("made-up",))):
        desk = asked(tmp_path / teacher.strip("/"), teacher=teacher)
        assert desk.desk.names.known == known, "where a teacher's folder is concerns no client"
        for name in known:
            assert desk.completions(desk.truths[4].ids_L.tolist(), 1, model=name)["model"] == "made-up"


def test_an_echoed_prompt_has_its_log_probabilities_by_token(tmp_path: Path) -> None:
    desk = asked(tmp_path)
    truth = max(desk.truths, key=lambda truth: truth.length)
    raw = {"prompt": truth.ids_L.tolist(), "max_tokens": 0, "echo": True, "logprobs": 3, "temperature": 0}
    answer, said = desk.post(COMPLETIONS, raw | {"return_tokens_as_token_ids": True})
    assert answer.status == 200
    assert said["choices"][0]["prompt_logprobs"] == expected_positions(truth, truth.length, 3)
    logprobs = said["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in truth.ids_L]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for position, own, top in zip(
        expected_positions(truth, truth.length, 3)[1:],
        logprobs["token_logprobs"][1:],
        logprobs["top_logprobs"][1:],
        strict=True,
    ):
        assert position is not None
        assert top == {f"token_id:{i}": entry["logprob"] for i, entry in position.items()}
        assert own == next(iter(position.values()))["logprob"]
    message = desk.refused(COMPLETIONS, raw, 400)
    assert "text needs the teacher's tokenizer" in message


@pytest.mark.parametrize("seed", range(3))
def test_trls_server_answers_completions_alone_in_both_formats(tmp_path: Path, seed: int) -> None:
    desk = asked(tmp_path, seed=seed)
    rng = np.random.default_rng(seed)
    some = [(truth, n, int(rng.integers(0, n + 1))) for truth, n in prefixes(desk.truths)][::7]
    sequences, lengths = [truth.ids_L[:n].tolist() for truth, n, _ in some], [first for _, _, first in some]
    for k in (1, 4):
        lists, binary = (desk.sequences(sequences, lengths, k, form) for form in ("json", "binary"))
        longest = max(n - first for _, n, first in some)
        assert binary["shape"] == [len(some), longest, k]
        assert binary["completion_lengths"] == [n - first for _, n, first in some]
        of = arrays(binary)
        for number, (truth, n, first) in enumerate(some):
            said_logprobs, said_ids = lists["logprobs"][number], lists["logprob_token_ids"][number]
            assert len(said_logprobs) == len(said_ids) == n - first
            for at, position in enumerate(expected_positions(truth, n, k)[first:]):
                if position is None:
                    assert said_logprobs[at] == said_ids[at] == []
                    assert np.isneginf(of["logprobs"][number, at]).all()
                    continue
                ranked = sorted(position.items(), key=lambda item: item[1]["rank"])
                assert said_ids[at] == [int(i) for i, _ in ranked]
                assert said_logprobs[at] == [entry["logprob"] for _, entry in ranked]
                assert of["ids"][number, at].tolist() == [int(i) for i, _ in ranked[:k]]
                np.testing.assert_array_equal(
                    of["logprobs"][number, at], np.array([e["logprob"] for _, e in ranked[:k]], dtype=np.float32)
                )
                own_id = int(truth.ids_L[first + at])
                assert of["own_ids"][number, at, 0] == own_id
                assert of["own"][number, at, 0] == np.float32(position[str(own_id)]["logprob"])
            assert np.isneginf(of["logprobs"][number, n - first :]).all()


def test_a_cache_of_some_positions_answers_for_those_and_names_one_that_it_has_not(tmp_path: Path) -> None:
    desk = asked(tmp_path, kept=0.7)
    answered = 0
    for truth in desk.truths:
        ids = truth.ids_L.tolist()
        kept = {int(position) + 1 for position in truth.topk_positions}
        for first in range(len(ids) + 1):
            wanted = set(range(max(first, 1), len(ids)))
            raw = {"sequences": [ids], "prompt_lengths": [first], "top_logprobs": 2}
            if missing := wanted - kept:
                message = desk.refused(SEQUENCE_LOGPROBS, raw, 404)
                assert f"it has none of token {min(missing)} (counted from 0), and of {len(missing)} in all" in message
                continue
            _, said = desk.post(SEQUENCE_LOGPROBS, raw)
            answered += len(wanted)
            for token in wanted:
                expected = expected_positions(truth, len(ids), 2)[token]
                assert expected is not None
                ranked = sorted(expected.items(), key=lambda item: item[1]["rank"])
                assert said["logprob_token_ids"][0][token - first] == [int(i) for i, _ in ranked]
    assert answered > 20


def test_rows_that_are_not_kept_are_null_where_the_server_was_told_so(tmp_path: Path) -> None:
    desk = asked(tmp_path, kept=0.5, not_kept="null")
    for truth, n in prefixes(desk.truths):
        kept = {int(position) + 1 for position in truth.topk_positions}
        expected = [p if t in kept else None for t, p in enumerate(expected_positions(truth, n, 5))]
        assert desk.completions(truth.ids_L[:n].tolist(), 5)["choices"][0]["prompt_logprobs"] == expected


def test_of_documents_that_begin_alike_one_that_keeps_what_is_asked_answers(tmp_path: Path) -> None:
    ids_L = np.arange(10, dtype=np.uint32)
    longer_L = np.arange(14, dtype=np.uint32)
    some = made_up.truths(0, KEYS[0], n=6)
    kept = ([1, 2], [4, 5, 6], [0, 1, 2, 3], [7], [8], [6, 7, 8])
    of = [with_ids(t, longer_L if i > 3 else ids_L, rows) for i, (t, rows) in enumerate(zip(some, kept, strict=True))]
    desk = asked_of(tmp_path / "refuse", {KEYS[0]: of}, positions=True)
    # The rows about tokens 5 to 6, 1 to 4, 9, and 7 to 9: of the documents 1, 2, 4 and 5.
    for n, first, there in ((7, 5, 1), (5, 1, 2), (10, 9, 4), (10, 7, 5)):
        said = desk.sequences([ids_L[:n].tolist()], [first], 5, "json")
        expected = [
            sorted(p.values(), key=lambda e: e["rank"]) for p in expected_positions(of[there], n, 5)[first:] if p
        ]
        assert said["logprobs"][0] == [[entry["logprob"] for entry in position] for position in expected]
    message = desk.refused(
        SEQUENCE_LOGPROBS, {"sequences": [ids_L.tolist()], "prompt_lengths": [1], "top_logprobs": 2}, 404
    )
    assert "it has none of token" in message
    desk = asked_of(tmp_path / "null", {KEYS[0]: of}, positions=True, not_kept="null")
    said = desk.completions(ids_L.tolist(), 5)["choices"][0]["prompt_logprobs"]
    expected_of_most = [p if t in (1, 2, 3, 4) else None for t, p in enumerate(expected_positions(of[2], 10, 5))]
    assert said == expected_of_most, "of none that keeps all, the one that keeps most"


def test_text_is_answered_by_the_teachers_tokenizer_where_it_is_here(tmp_path: Path) -> None:
    words = {f'w"{i}': i for i in range(made_up.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, 'w"0'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    desk = asked(tmp_path / "store", tokens=open_tokens(tmp_path, {}))
    truth = desk.truths[3]
    text = " ".join(f'w"{i}' for i in truth.ids_L)
    said = desk.completions([text], 2)["choices"][0]["prompt_logprobs"]
    for found, expected in zip(said, expected_positions(truth, truth.length, 2), strict=True):
        assert (found is None) == (expected is None)
        for i, entry in (expected or {}).items():
            assert found[i] == entry | {"decoded_token": f'w"{i}'}
    echoed = desk.completions(text, 2, echo=True)["choices"][0]["text"]
    assert echoed == text
    assert desk.completions(truth.ids_L.tolist(), 2, echo=True)["choices"][0]["text"] == text


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    desk = asked(tmp_path, tokens=Tokens(None, "it is not on the server's machine"))
    message = desk.refused(COMPLETIONS, {"prompt": "a text", "max_tokens": 0, "prompt_logprobs": 1}, 400)
    assert message == (
        "a prompt that is text needs the teacher's tokenizer, and it is not on the server's machine: send token ids"
    )
