"""Documents that are longer than the recipe allows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kd_assets.errors import RecipeError
from kd_assets.sources.tokenise import load_tokeniser
from kd_assets.sources.tokenised import TokenisedDocument
from kd_assets_tests.sources.conftest import UNMARKED_TEMPLATE, SaveTokenizer, chat_record, text_record
from kd_assets_tests.sources.test_tokenise import params

TEXT = "The import statement finds a module, loads it and binds a name. " * 4


def documents(save_tokenizer: SaveTokenizer, record: Any, **changes: Any) -> list[TokenisedDocument]:
    (outcome,) = load_tokeniser(params(save_tokenizer(UNMARKED_TEMPLATE), **changes))([record])
    assert isinstance(outcome, list)
    return outcome


@pytest.mark.parametrize("overlap", [0, 1, 7])
def test_windows_hold_every_token_and_each_is_learned_once(save_tokenizer: SaveTokenizer, overlap: int) -> None:
    (whole,) = documents(save_tokenizer, text_record(TEXT))
    windows = documents(save_tokenizer, text_record(TEXT), max_length=8, on_long="split", overlap=overlap)
    assert [w.document_id for w in windows] == [f"d0/{i}" for i in range(1, len(windows) + 1)]
    assert all(w.record is windows[0].record for w in windows)
    assert [len(w.input_ids) for w in windows[:-1]] == [8] * (len(windows) - 1)
    learned = [i for w in windows for i in w.input_ids[w.loss_mask].tolist()]
    assert learned == whole.input_ids.tolist()
    for one, two in itertools.pairwise(windows):
        assert one.input_ids.tolist()[8 - overlap :] == two.input_ids.tolist()[:overlap]
        assert not two.loss_mask[:overlap].any()


def test_a_document_that_is_short_enough_is_left_as_it_is(save_tokenizer: SaveTokenizer) -> None:
    (whole,) = documents(save_tokenizer, text_record(TEXT))
    n = len(whole.input_ids)
    for on_long in ("truncate", "split", "drop"):
        (same,) = documents(save_tokenizer, text_record(TEXT), max_length=n, on_long=on_long)
        assert same.input_ids.tolist() == whole.input_ids.tolist()
        assert (same.document_id, same.truncated, same.dropped) == ("d0", False, False)


def test_a_document_that_is_left_out_says_so(save_tokenizer: SaveTokenizer) -> None:
    (dropped,) = documents(save_tokenizer, text_record(TEXT), max_length=8, on_long="drop")
    assert dropped.dropped
    assert not len(dropped.input_ids)


def test_a_chat_that_is_cut_keeps_what_of_its_mask_remains(save_tokenizer: SaveTokenizer) -> None:
    chat = chat_record(("user", "hi"), ("assistant", TEXT))
    (whole,) = documents(save_tokenizer, chat)
    (cut,) = documents(save_tokenizer, chat, max_length=40)
    assert cut.truncated
    assert cut.loss_mask.tolist() == whole.loss_mask.tolist()[:40]
    assert cut.loss_mask.any()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"on_long": "split", "overlap": 8}, "overlap is 8, and max_length 8"),
        ({"on_long": "split", "overlap": -1}, "overlap is -1"),
        ({"overlap": 2}, "only windows overlap"),
    ],
)
def test_windows_that_cannot_be_are_errors_of_the_recipe(
    save_tokenizer: SaveTokenizer, changes: dict[str, Any], error: str
) -> None:
    with pytest.raises(RecipeError, match=error):
        documents(save_tokenizer, text_record(TEXT), max_length=8, **changes)
