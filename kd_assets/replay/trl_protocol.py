"""`/get_sequence_logprobs/` as TRL's own server answered it (trl/scripts/vllm_serve.py, up to TRL 1.10), in both of its
formats. Later versions of TRL ask `/v1/completions` (see `vllm_protocol`).

What is asked are the tokens of each sequence from its prompt's length on; of the first token of a sequence nothing is
known. In `json` a position has its top k by rank, and its own token besides where that is not among them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_assets.errors import RefusedRequestError
from kd_assets.replay.cache import ReplayCache, Rows, Search
from kd_assets.replay.index import Uint32Array
from kd_assets.replay.requests import (
    Limits,
    require_answer_within,
    require_known,
    token_ids,
    whole_number,
)
from kd_assets.replay.vllm_protocol import float16_texts, own_logprob_texts, require_temperature

DEFAULT_TOP_LOGPROBS = 100
"""TRL's own, which few caches have: most requests say another."""

_FIELDS = ("sequences", "prompt_lengths", "top_logprobs", "temperature", "response_format")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequencesRequest:
    """Sequences, and how many tokens of each are its prompt."""

    sequences: Sequence[Uint32Array]
    prompt_lengths: Sequence[int]
    k: int
    binary: bool

    @property
    def longest_completion(self) -> int:
        return max((len(s) - n for s, n in zip(self.sequences, self.prompt_lengths, strict=True)), default=0)


def parse_sequences(raw: Mapping[str, Any], *, cache: ReplayCache, limits: Limits) -> SequencesRequest:
    """What the body of a request asks. Raises RefusedRequestError, which names the field, for what has no answer."""
    require_known(raw, _FIELDS)
    sequences, lengths = raw.get("sequences"), raw.get("prompt_lengths")
    if not isinstance(sequences, list) or not isinstance(lengths, list) or len(sequences) != len(lengths):
        raise RefusedRequestError("sequences and prompt_lengths are not two lists of the same length")
    if not sequences:
        raise RefusedRequestError("sequences is empty: send at least one")
    if len(sequences) > limits.sequences:
        raise RefusedRequestError(
            f"{len(sequences)} sequences, and a request has at most {limits.sequences}", status=413
        )
    ids = [token_ids(s, f"sequences[{i}]", vocabulary=cache.vocabulary) for i, s in enumerate(sequences)]
    for number, (sequence, length) in enumerate(zip(ids, lengths, strict=True)):
        if not 0 <= whole_number(length, f"prompt_lengths[{number}]") <= len(sequence):
            raise RefusedRequestError(
                f"prompt_lengths[{number}] is not from 0 to the length of its sequence, which is {len(sequence)}"
            )
    require_temperature(raw.get("temperature"))
    k = whole_number(raw.get("top_logprobs", DEFAULT_TOP_LOGPROBS), "top_logprobs")
    cache.require_k(k)
    if k == 0:
        raise RefusedRequestError("top_logprobs is 0: ask for at least 1")
    response_format = raw.get("response_format", "json")
    if response_format not in ("json", "binary"):
        raise RefusedRequestError("response_format is neither 'json' nor 'binary'")
    request = SequencesRequest(sequences=ids, prompt_lengths=lengths, k=k, binary=response_format == "binary")
    # Arrays are as long as the longest completion for every sequence.
    require_answer_within(limits, len(ids) * request.longest_completion, k)
    return request


def answer_sequences(request: SequencesRequest, *, cache: ReplayCache) -> tuple[bytes, int]:
    """The body of the answer, and how many positions it tells of. Raises as `ReplayCache.rows` does."""
    search = Search()
    rows = [
        cache.rows(sequence, first=length, k=request.k, name=f"sequence {number}", search=search)
        for number, (sequence, length) in enumerate(zip(request.sequences, request.prompt_lengths, strict=True))
    ]
    n_positions = sum(len(of_sequence.tokens_M) for of_sequence in rows)
    if request.binary:
        return json.dumps(_arrays(request, rows)).encode(), n_positions
    parts = [_lists(of, n, request.k) for of, n in zip(rows, request.prompt_lengths, strict=True)]
    logprobs, ids = (",".join(part[side] for part in parts) for side in (0, 1))
    return f'{{"logprobs":[{logprobs}],"logprob_token_ids":[{ids}]}}'.encode(), n_positions


def _arrays(request: SequencesRequest, rows: Sequence[Rows]) -> dict[str, Any]:
    """float32 and int32 [B, T, k], and [B, T, 1] of the sequences' own tokens; minus infinity and 0 elsewhere."""
    shape = (len(rows), request.longest_completion, request.k)
    logprobs_BTk, ids_BTk = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32)
    own_BT, own_ids_BT = np.full((*shape[:2], 1), -np.inf, np.float32), np.zeros((*shape[:2], 1), np.int32)
    for number, (of_sequence, length) in enumerate(zip(rows, request.prompt_lengths, strict=True)):
        at = of_sequence.tokens_M - length
        logprobs_BTk[number, at] = of_sequence.topk_logprobs_Mk[:, : request.k]
        ids_BTk[number, at] = of_sequence.topk_ids_Mk[:, : request.k]
        own_BT[number, at, 0] = [float(text) for text in own_logprob_texts(of_sequence)]
        own_ids_BT[number, at, 0] = of_sequence.ids_L[of_sequence.tokens_M]
    arrays = {
        "logprobs_b64": logprobs_BTk.astype("<f4"),
        "token_ids_b64": ids_BTk.astype("<i4"),
        "actual_logprobs_b64": own_BT.astype("<f4"),
        "actual_token_ids_b64": own_ids_BT.astype("<i4"),
    }
    lengths = [len(s) - n for s, n in zip(request.sequences, request.prompt_lengths, strict=True)]
    encoded = {name: base64.b64encode(array.tobytes()).decode("ascii") for name, array in arrays.items()}
    return {**encoded, "shape": list(shape), "completion_lengths": lengths}


def _lists(rows: Rows, prompt_length: int, k: int) -> tuple[str, str]:
    """Log-probabilities and ids of one sequence as JSON, a list for each token from the prompt's length on."""
    n = len(rows.ids_L) - prompt_length
    logprobs, ids = ["[]"] * n, ["[]"] * n
    own_texts = own_logprob_texts(rows)
    texts = float16_texts()[rows.topk_logprobs_Mk[:, :k].view(np.uint16)].tolist()
    for row, token in enumerate((rows.tokens_M - prompt_length).tolist()):
        outside = int(rows.target_rank_M[row]) > k
        of_row = [*texts[row], *([own_texts[row]] if outside else [])]
        row_ids = [*rows.topk_ids_Mk[row, :k].tolist(), *([int(rows.ids_L[rows.tokens_M[row]])] if outside else [])]
        logprobs[token], ids[token] = f"[{','.join(of_row)}]", f"[{','.join(map(str, row_ids))}]"
    return f"[{','.join(logprobs)}]", f"[{','.join(ids)}]"
