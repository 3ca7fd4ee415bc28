"""What is not in the cache, and what nobody should have sent: an error that says so, and tells nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from kd_assets.errors import NotCommittedError, RecipeError
from kd_assets.replay import cache as replay_cache
from kd_assets.replay.answering import COMPLETIONS, SEQUENCE_LOGPROBS
from kd_assets.replay.cache import open_cache
from kd_assets.replay.requests import Limits
from kd_assets.replay.tokens import Tokens
from kd_assets_tests.export import made_up
from kd_assets_tests.replay.desks import KEYS, Asked, Counted, asked, asked_of, finite, with_ids

ROUTES = (COMPLETIONS, SEQUENCE_LOGPROBS)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked(tmp_path_factory.mktemp("desk"))


def asking(ids: object, **fields: Any) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 2, **fields}


def longest(desk: Asked) -> list[int]:
    found: list[int] = max(desk.truths, key=lambda truth: truth.length).ids_L.tolist()
    return found


def test_a_sequence_that_no_document_begins_with_is_a_miss(desk: Asked) -> None:
    ids = longest(desk)
    changed = [*ids[:-1], (ids[-1] + 1) % made_up.VOCABULARY]
    answer, said = desk.post(COMPLETIONS, asking([ids, changed]))
    assert (answer.status, answer.is_miss, answer.n_positions) == (404, True, 0)
    assert said["error"]["type"] == "NotFoundError"
    message = said["error"]["message"]
    assert message.startswith(f"prompt 1 ({len(ids)} token ids) is not in the top-k cache of recipe made-up, variant ")
    assert "a document begins with its first 16 ids, none with all of them" in message
    # Neither from the middle of a document, which the teacher saw with more before it.
    assert "not in the top-k cache" in desk.refused(COMPLETIONS, asking(ids[1:]), 404)


def test_a_sequence_that_goes_on_from_a_document_is_longer_than_the_cache(tmp_path: Path) -> None:
    desk = asked(tmp_path, cut=9)
    truth = max(desk.truths, key=lambda truth: truth.length)
    assert desk.completions(truth.ids_L[:9].tolist(), 2)
    message = desk.refused(COMPLETIONS, asking(truth.ids_L[:15].tolist()), 404)
    assert message.startswith("prompt 0 (15 token ids) is longer than what the cache has: its document ends after 9.")


def test_more_documents_that_begin_alike_than_are_compared_are_no_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = asked(tmp_path, n=40)
    truth = max(desk.truths, key=lambda truth: truth.length)
    monkeypatch.setattr(replay_cache, "MAX_CANDIDATES", 0)
    message = desk.refused(COMPLETIONS, asking(truth.ids_L[:17].tolist()), 404)
    assert "is no whole document, and 1 documents begin with its first 16 ids: with the request's other" in message
    assert desk.completions(truth.ids_L.tolist(), 2), "whole documents are found by the hash of all their ids"


def test_what_is_compared_is_bounded_for_a_request_and_not_for_each_of_its_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 documents with the same 16 ids first, so that every one of them may be what is asked.
    documents = made_up.truths(0, KEYS[0], n=40)
    ids_L = np.arange(16, dtype=np.uint32)
    alike = [with_ids(t, np.concatenate([ids_L, np.array([i, i], np.uint32)])) for i, t in enumerate(documents)]
    desk = asked_of(tmp_path, {KEYS[0]: alike})
    monkeypatch.setattr(replay_cache, "MAX_CANDIDATES", 60)
    last = [*ids_L.tolist(), 39]
    counted = Counted(desk.desk.cache._compared, desk.desk.cache._reader)
    assert desk.completions(last, 1)
    assert counted.n_compared() == 40
    assert counted.n_whole() == 1, "of the others only the ids are read"
    assert desk.completions([last] * 300, 1), "a sequence that was found is not looked for again"
    assert counted.n_compared() == 80
    message = desk.refused(COMPLETIONS, asking([last, [*ids_L.tolist(), 38]]), 404)
    assert message.startswith("prompt 1 (17 token ids) is no whole document, and 40 documents begin with its first 16")
    assert "more than the 60 that are compared for one request" in message
    assert counted.n_compared() == 140
    assert desk.completions([last, *(t.ids_L.tolist() for t in alike)], 1), "whole documents are found all the same"


@pytest.mark.parametrize("k", [6, 100, -1, 10**30])
def test_a_k_that_the_cache_has_not_is_refused(desk: Asked, k: int) -> None:
    for route, raw in (
        (COMPLETIONS, asking(longest(desk), prompt_logprobs=k)),
        (COMPLETIONS, asking(longest(desk), prompt_logprobs=None, logprobs=k, echo=True)),
        (SEQUENCE_LOGPROBS, {"sequences": [longest(desk)], "prompt_lengths": [1], "top_logprobs": k}),
    ):
        message = desk.refused(route, raw, 400)
        assert message.startswith(f"the {k} most probable tokens are asked for, and the cache of recipe made-up has 5")
    assert "the 100 most probable" in desk.refused(
        SEQUENCE_LOGPROBS, {"sequences": [longest(desk)], "prompt_lengths": [1]}, 400
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 2}, "max_tokens (16 where it is not said) asks for generated tokens"),
        ({"max_tokens": None}, "asks for generated tokens"),
        ({"max_tokens": True}, "asks for generated tokens"),
        ({"max_tokens": 1.0}, "asks for generated tokens"),
        ({"temperature": 0.7}, "temperature: the cache has log-probabilities at temperature 1"),
        ({"temperature": "1"}, "temperature: the cache has"),
        ({"temperature": True}, "temperature: the cache has"),
        ({"prompt_logprobs": None}, "nothing is asked that a cache can answer"),
        ({"prompt_logprobs": True}, "prompt_logprobs is true or false: send a whole number"),
        ({"prompt_logprobs": 2.0}, "prompt_logprobs is a fraction: send a whole number"),
        ({"prompt_logprobs": "2"}, "prompt_logprobs is a string: send a whole number"),
        ({"logprobs": 2}, "logprobs without echo are those of generated tokens"),
        ({"n": 2}, "the field 'n' would change the answer"),
        ({"n": True}, "the field 'n' would change the answer"),
        ({"stream": True}, "the field 'stream' would change the answer"),
        ({"suffix": "x"}, "the field 'suffix' would change the answer"),
        ({"logit_bias": {"3": 1}}, "the field 'logit_bias' would change the answer"),
        ({"truncate_prompt_tokens": 3}, "the field 'truncate_prompt_tokens' would change the answer"),
        ({"prompt_embeds": "AAAA"}, "the field 'prompt_embeds' would change the answer"),
        ({"logprobs_mode": "raw"}, "the field 'logprobs_mode' is not known here, and may change the answer"),
        ({"\ud800\x1b[2J": 1}, "the field '\\\\ud800\\\\x1b[2J' is not known here"),
        ({"echo": 1}, "echo is not true or false"),
        ({"add_special_tokens": "no"}, "add_special_tokens is not true or false"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(desk: Asked, fields: dict[str, Any], message: str) -> None:
    assert message in desk.refused(COMPLETIONS, asking(longest(desk), **fields), 400)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt is missing or empty"),
        ([], "prompt is missing or empty"),
        ({}, "prompt is missing or empty"),
        (7, "prompt is missing or empty"),
        ([[]], "prompt[0] is an empty list: send a list of at least one token id"),
        ([[1, 2], None], "prompt[1] is null: send a list of at least one token id"),
        ([[1, 2], "text"], "prompt[1] is a string: send a list of at least one token id"),
        ([[1, [2]]], "prompt[0][1] is a list: token ids are whole numbers"),
        ([1, -1], "prompt[1] is no token id: they are from 0 to 39"),
        ([1, 40], "prompt[1] is no token id: they are from 0 to 39"),
        ([1, 2**32 + 1], "prompt[1] is no token id"),
        ([1, 10**40], "prompt[1] is no token id"),
        ([1, 2.0], "prompt[1] is a fraction: token ids are whole numbers"),
        ([1, True], "prompt[1] is true or false: token ids are whole numbers"),
        ([1, None], "prompt[1] is null: token ids are whole numbers"),
        ([1, "2"], "prompt[1] is a string: token ids are whole numbers"),
        ([1, {"a": 1}], "prompt[1] is an object: token ids are whole numbers"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused_by_their_place(desk: Asked, prompt: object, message: str) -> None:
    assert message in desk.refused(COMPLETIONS, asking(prompt), 400)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequences": None}, "sequences and prompt_lengths are not two lists of the same length"),
        ({"sequences": [[1], [2]]}, "sequences and prompt_lengths are not two lists of the same length"),
        ({"sequences": [], "prompt_lengths": []}, "sequences is empty"),
        ({"sequences": [[1, "2"]]}, "sequences[0][1] is a string"),
        ({"prompt_lengths": [-1]}, "prompt_lengths[0] is not from 0 to the length of its sequence, which is 2"),
        ({"prompt_lengths": [3]}, "prompt_lengths[0] is not from 0 to the length of its sequence, which is 2"),
        ({"prompt_lengths": [1.0]}, "prompt_lengths[0] is a fraction"),
        ({"prompt_lengths": [True]}, "prompt_lengths[0] is true or false"),
        ({"top_logprobs": 0}, "top_logprobs is 0: ask for at least 1"),
        ({"top_logprobs": None}, "top_logprobs is null"),
        ({"temperature": 2.0}, "temperature: the cache has log-probabilities at temperature 1"),
        ({"response_format": "pickle"}, "response_format is neither 'json' nor 'binary'"),
        ({"response_format": ["json"]}, "response_format is neither 'json' nor 'binary'"),
        ({"model": "x"}, "the field 'model' is not known here"),
    ],
)
def test_malformed_requests_of_trls_protocol_are_refused(desk: Asked, fields: dict[str, Any], message: str) -> None:
    raw = {"sequences": [[1, 2]], "prompt_lengths": [1], "top_logprobs": 2} | fields
    assert message in desk.refused(SEQUENCE_LOGPROBS, raw, 400)


@pytest.mark.parametrize("model", ["other", "", 3, ["made-up"], {"a": 1}])
def test_another_model_is_not_here(desk: Asked, model: object) -> None:
    assert desk.refused(COMPLETIONS, asking([1], model=model), 404) == (
        "the model that is asked is not here: this server has made-up"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"secret text",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": [1, NaN], "max_tokens": 1}',
        b'{"prompt": [1], "temperature": Infinity}',
        b'{"prompt": [1], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": [1, 2',
        b"[1, 2]",
        b'"secret text"',
        b"null",
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_bodies_that_are_no_json_object_are_refused_and_not_quoted(desk: Asked, route: str, body: bytes) -> None:
    answer = desk.desk.answer(route, body, 0, "cmpl-0")
    message = json.loads(answer.body)["error"]["message"]
    assert answer.status == 400
    assert message.startswith(("the body is no JSON", "the body is a JSON"))
    assert "secret" not in message


def test_more_than_the_limits_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    desk = asked(tmp_path, limits=Limits(sequences=2, answer_logprobs=30))
    assert "3 prompts, and a request has at most 2" in desk.refused(COMPLETIONS, asking([[1], [2], [3]]), 413)
    message = desk.refused(COMPLETIONS, asking([1] * 11), 413)
    assert message.startswith("11 positions with 3 log-probabilities each are asked for, and an answer has at most 30")
    raw = {"sequences": [[1] * 9, [1]], "prompt_lengths": [0, 0], "top_logprobs": 2}
    assert "18 positions with 3 log-probabilities" in desk.refused(SEQUENCE_LOGPROBS, raw, 413)
    raw = {"sequences": [[1]] * 3, "prompt_lengths": [0] * 3, "top_logprobs": 2}
    assert "3 sequences, and a request has at most 2" in desk.refused(SEQUENCE_LOGPROBS, raw, 413)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_sent_gets_an_answer_and_never_one_of_the_server_being_at_fault(tmp_path: Path, seed: int) -> None:
    words = {f"w{i}": i for i in range(made_up.VOCABULARY)}
    desk = asked(tmp_path, tokens=Tokens(Tokenizer(models.WordLevel(words, "w0"))))
    rng = random.Random(seed)
    ids = longest(desk)
    values: list[Any] = [None, True, 0, 1, -1, 2.5, 1e300, "", "x", [], [ids], ids, [[]], {}, {"a": []}, 2**64, [None]]
    values += ["\ud800", ["w1", "x\udfff"], "\x00", ["w3", ""]]
    names = ["prompt", "max_tokens", "prompt_logprobs", "logprobs", "echo", "n", "temperature", "sequences"]
    names += ["prompt_lengths", "top_logprobs", "response_format", "model", "return_token_ids", "stream", "other"]
    for _ in range(400):
        raw = {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 6))}
        if rng.random() < 0.5:
            raw = asking(ids) | raw
        for route in ROUTES:
            answer, said = desk.post(route, raw)
            assert answer.status in (200, 400, 404, 413), (raw, said)
            assert ("error" in said) == (answer.status != 200)


@pytest.mark.parametrize(("text", "at"), [("\ud800", 0), ("a\udc00b", 1), ("\U0001f600\ud83d", 1)])
def test_text_with_half_of_a_surrogate_pair_is_refused(tmp_path: Path, text: str, at: int) -> None:
    desk = asked(tmp_path, tokens=Tokens(Tokenizer(models.WordLevel({"w0": 0}, "w0"))))
    for prompt in (text, ["w0", text]):
        message = desk.refused(COMPLETIONS, asking(prompt, echo=True), 400)
        assert message.startswith(f"a prompt has half of a surrogate pair at character {at}")


def test_a_part_that_was_changed_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = asked(tmp_path)
    part = next(desk.recipe_folder.glob("topk_cache/*/made-up-00000/*/part-00001.parquet"))
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.chmod(0o644)
    part.write_bytes(data)
    statuses = {}
    for truth in desk.truths:
        answer, said = desk.post(COMPLETIONS, asking(truth.ids_L.tolist()))
        statuses[truth.document_id, truth.partition_key] = answer.status
        if answer.status != 200:
            assert said["error"]["message"] == "the cache cannot be read: see the server's log"
            assert str(tmp_path) not in said["error"]["message"]
    assert sorted(statuses.values()).count(500) == 3, "the documents of this part"
    assert "was changed after its commit" in caplog.text


def test_a_cache_that_cannot_be_served_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(NotCommittedError):
        open_cache(tmp_path / "nothing")
    desk = asked(tmp_path)
    with pytest.raises(RecipeError, match="this one keeps all"):
        open_cache(desk.recipe_folder, not_kept="null")
    with pytest.raises(NotCommittedError, match="made-up-00007"):
        open_cache(desk.recipe_folder, partition_keys=["made-up-00007"])


def test_minus_infinity_is_written_as_vllm_writes_it(tmp_path: Path) -> None:
    desk = asked(tmp_path)
    truth = max(desk.truths, key=lambda truth: truth.length)
    rows = desk.desk.cache.rows(truth.ids_L, first=0, k=2, name="it")
    object.__setattr__(rows, "target_logprob_M", np.full_like(rows.target_logprob_M, -np.inf))
    from kd_assets.replay.vllm_protocol import prompt_logprobs_json

    said = json.loads(prompt_logprobs_json(rows, k=2, tokens=desk.desk.tokens))
    unknown = [entry for position in said[1:] for entry in position.values() if "rank_is_lower_bound" in entry]
    assert unknown
    assert {entry["logprob"] for entry in unknown} == {-9999.0}
    assert all(finite(entry["logprob"]) for position in said[1:] for entry in position.values())
