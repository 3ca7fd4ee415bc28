"""Caches of random documents behind a desk that answers in this process, and what its answers must be."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.replay.answering import COMPLETIONS, SEQUENCE_LOGPROBS, Answer, Desk
from kd_assets.replay.cache import NotKept, open_cache
from kd_assets.replay.requests import Limits
from kd_assets.replay.serving import model_names
from kd_assets.replay.tokens import Tokens
from kd_assets.store import CacheReader
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth

KEYS = ("made-up-00000", "made-up-00001")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A desk, and the documents of its cache as they were before anything was cut or left out."""

    desk: Desk
    truths: Sequence[Truth]
    recipe_folder: Path

    def post(self, route: str, raw: object) -> tuple[Answer, Any]:
        answer = self.desk.answer(route, json.dumps(raw).encode(), 0, "cmpl-0")
        return answer, json.loads(answer.body, parse_constant=_no_number)

    def completions(self, prompt: object, k: int, **fields: Any) -> Any:
        raw = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": k, **fields}
        answer, said = self.post(COMPLETIONS, raw)
        assert answer.status == 200, said
        return said

    def sequences(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], k: int, form: str) -> Any:
        raw = {"sequences": sequences, "prompt_lengths": prompt_lengths, "top_logprobs": k, "response_format": form}
        answer, said = self.post(SEQUENCE_LOGPROBS, raw)
        assert answer.status == 200, said
        return said

    def refused(self, route: str, raw: object, status: int) -> str:
        answer, said = self.post(route, raw)
        assert answer.status == status, said
        assert said["error"]["code"] == status
        return str(said["error"]["message"])


def asked(
    folder: Path,
    *,
    seed: int = 0,
    n: int = 12,
    k: int = 5,
    kept: float | None = None,
    cut: int | None = None,
    not_kept: NotKept = "refuse",
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    teacher: str = "",
) -> Asked:
    """Two partitions of `n` documents each. `kept`: the share of positions that the cache keeps; None: all. `cut`: its
    `max_length`."""
    documents = {key: made_up.truths(seed, key, n=n, k=k, kept=1.0 if kept is None else kept) for key in KEYS}
    return asked_of(
        folder,
        documents,
        positions=kept is not None,
        cut=cut,
        not_kept=not_kept,
        limits=limits,
        tokens=tokens,
        teacher=teacher,
    )


def asked_of(
    folder: Path,
    documents: Mapping[str, Sequence[Truth]],
    *,
    positions: bool = False,
    cut: int | None = None,
    not_kept: NotKept = "refuse",
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    teacher: str = "",
) -> Asked:
    """A desk for these documents, by partition. `positions`: the cache keeps those of `Truth` only."""
    for of_partition in documents.values():
        made_up.commit(
            folder,
            of_partition,
            assets=("topk_cache",),
            positions=positions,
            max_lengths=None if cut is None else {"topk_cache": cut},
            provenance={"teacher": teacher} if teacher else None,
        )
    truths = [truth for of_partition in documents.values() for truth in of_partition]
    cache = open_cache(folder / made_up.RECIPE, not_kept=not_kept)
    desk = Desk(
        cache=cache,
        tokens=tokens or Tokens(None, "there is none"),
        names=model_names(cache),
        limits=limits or Limits(),
    )
    return Asked(desk=desk, truths=truths, recipe_folder=folder / made_up.RECIPE)


def with_ids(truth: Truth, ids_L: npt.NDArray[np.uint32], kept: Sequence[int] | None = None) -> Truth:
    """A document with these ids and numbers drawn for their positions. `kept`: its positions; None: all."""
    m = len(ids_L) - 1
    rng = np.random.default_rng([m, *truth.document_id.encode()])
    k = truth.topk_ids_Mk.shape[1]
    return dataclasses.replace(
        truth,
        ids_L=ids_L,
        mask_L=np.ones(len(ids_L), np.bool_),
        topk_ids_Mk=np.argsort(rng.random((m, made_up.VOCABULARY)), axis=1)[:, :k].astype(np.uint32),
        topk_logprobs_Mk=(-np.sort(rng.exponential(2, (m, k)), axis=1) - 3).astype(np.float16),
        logsumexp_M=np.zeros(m, np.float32),
        target_logprob_M=-rng.exponential(3, m).astype(np.float32),
        topk_positions=np.array(range(m) if kept is None else kept, np.uint32),
    )


class Counted:
    """How many documents two readers have given from now on."""

    def __init__(self, compared: CacheReader, whole: CacheReader) -> None:
        self._counts = [_counting(compared), _counting(whole)]

    def n_compared(self) -> int:
        return self._counts[0][0]

    def n_whole(self) -> int:
        return self._counts[1][0]


def _counting(reader: CacheReader) -> list[int]:
    count = [0]
    given = reader.documents

    def documents(rows: Any) -> Any:
        count[0] += len(rows)
        return given(rows)

    reader.documents = documents  # type: ignore[method-assign]
    return count


def prefixes(truths: Sequence[Truth], longest: int = 1 << 30) -> Iterator[tuple[Truth, int]]:
    """Every beginning of every document that no other document begins with, too: two may have other numbers."""
    for truth in truths:
        for n in range(1, min(truth.length, longest) + 1):
            same = [t for t in truths if np.array_equal(t.ids_L[:n], truth.ids_L[:n])]
            if len(same) == 1:
                yield truth, n


def expected_positions(truth: Truth, n: int, k: int) -> list[dict[str, dict[str, Any]] | None]:
    """What `prompt_logprobs: k` is of the document's first `n` tokens, from the document alone."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for row in range(n - 1):
        target = int(truth.ids_L[row + 1])
        ids = truth.topk_ids_Mk[row].tolist()
        logprobs = truth.topk_logprobs_Mk[row].astype(np.float64).tolist()
        ranked = {
            str(i): {"logprob": logprob, "rank": rank, "decoded_token": None}
            for rank, (i, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1)
        }
        if target in ids:
            own = ranked[str(target)]
        else:
            own = {
                "logprob": float(truth.target_logprob_M[row]),
                "rank": len(ids) + 1,
                "rank_is_lower_bound": True,
                "decoded_token": None,
            }
        found.append({str(target): own} | {i: ranked[i] for i in list(ranked)[:k]})
    return found


def arrays(said: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The binary answer of `/get_sequence_logprobs/` as its clients decode it."""
    batch, longest, k = said["shape"]

    def of(name: str, dtype: str, last: int) -> npt.NDArray[Any]:
        return np.frombuffer(base64.b64decode(said[name]), dtype).reshape(batch, longest, last)

    return {
        "logprobs": of("logprobs_b64", "<f4", k),
        "ids": of("token_ids_b64", "<i4", k),
        "own": of("actual_logprobs_b64", "<f4", 1),
        "own_ids": of("actual_token_ids_b64", "<i4", 1),
    }


def finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _no_number(word: str) -> Any:
    raise AssertionError(f"the answer has {word}, which is no JSON")
