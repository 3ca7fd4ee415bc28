"""`/v1/completions` with `prompt_logprobs`, as vLLM answers it (vllm/entrypoints/openai/completion), from a cache.

What a request may ask is the log-probabilities of its prompt. No token is generated: with `max_tokens` 1, which clients
send as vLLM's smallest, the completion is empty. Fields that concern generated tokens alone are taken and do nothing;
any other that could change the answer is refused by name. Log-probabilities are those at temperature 1, which vLLM
gives of a prompt whatever `temperature` says; one that asks for another is refused all the same, as trainers that send
it scale the student by it.

A position's dict has the prompt's own token first, then the top k. The rank of a token outside of the cache's top k is
not known: `rank` is then the smallest that it can be, and the entry has `rank_is_lower_bound` besides. Of a cache that
is cut to a vocabulary it has `outside_mass`, too, the teacher's probability of all other ids: every `logprob` of the
position is of the distribution without them, and plus log1p(−`outside_mass`) it is of the whole one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.errors import RefusedRequestError
from kd_assets.replay.cache import ReplayCache, Rows, Search
from kd_assets.replay.index import Uint32Array
from kd_assets.replay.requests import Limits, require_answer_within, require_known, token_ids, whole_number
from kd_assets.replay.tokens import Tokens

LOWEST_LOGPROB = -9999.0
"""What vLLM writes of minus infinity, which JSON lacks."""

_READ = (
    "model",
    "prompt",
    "max_tokens",
    "prompt_logprobs",
    "logprobs",
    "echo",
    "temperature",
    "add_special_tokens",
    "return_tokens_as_token_ids",
    "return_token_ids",
)

_OF_GENERATED_TOKENS = (
    *("seed", "stop", "stop_token_ids", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"),
    *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    *("user", "request_id", "session_id", "priority", "cache_salt"),
)
"""They change nothing of a prompt's log-probabilities, and nothing is generated."""

_ONLY_AS: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "stream": (None, False),
    "stream_options": (None,),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "use_beam_search": (None, False),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logprob_token_ids": (None,),
    "prompt_embeds": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "response_format": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "vllm_xargs": (None, {}),
    "kv_transfer_params": (None,),
}
"""Fields of vLLM's that would change the answer, with the values at which they do not."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompletionsRequest:
    """What is asked of each prompt."""

    prompts: Sequence[Uint32Array]
    texts: Sequence[str | None]
    """The prompts that were sent as text."""
    prompt_logprobs: int
    """The k of `prompt_logprobs`."""
    echo_logprobs: int | None
    """The k of `logprobs` of an echoed prompt; None: not in the answer."""
    echo: bool
    tokens_as_ids: bool
    return_token_ids: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNames:
    """What a request may call the model that it asks."""

    known: tuple[str, ...]
    """The first is the one that answers say."""

    def require(self, given: object) -> None:
        if given is not None and given not in self.known:
            raise RefusedRequestError(
                f"the model that is asked is not here: this server has {self.known[0]}", status=404
            )


def parse_completions(
    raw: Mapping[str, Any], *, cache: ReplayCache, tokens: Tokens, limits: Limits, names: ModelNames
) -> CompletionsRequest:
    """What the body of a request asks. Raises RefusedRequestError, which names the field, for what has no answer."""
    require_known(raw, (*_READ, *_OF_GENERATED_TOKENS, *_ONLY_AS))
    for name, allowed in _ONLY_AS.items():
        if not any(type(raw.get(name)) is type(value) and raw.get(name) == value for value in allowed):
            raise RefusedRequestError(f"the field {name!r} would change the answer, and is not supported: leave it out")
    names.require(raw.get("model"))
    _require_no_generation(raw)
    require_temperature(raw.get("temperature"))
    echo = _flag(raw, "echo")
    prompt_logprobs, logprobs = (_count_or_none(raw, name, cache) for name in ("prompt_logprobs", "logprobs"))
    if logprobs is not None and not echo:
        raise RefusedRequestError(
            "logprobs without echo are those of generated tokens, and none are generated: ask for prompt_logprobs"
        )
    # vLLM answers both where a prompt is echoed with its log-probabilities.
    of_prompt = logprobs if prompt_logprobs is None else prompt_logprobs
    if of_prompt is None:
        raise RefusedRequestError("nothing is asked that a cache can answer: ask for prompt_logprobs")
    prompts, texts = _prompts(
        raw.get("prompt"), cache=cache, tokens=tokens, limits=limits, special=_flag(raw, "add_special_tokens", True)
    )
    require_answer_within(limits, sum(map(len, prompts)), of_prompt + (logprobs or 0))
    return CompletionsRequest(
        prompts=prompts,
        texts=texts,
        prompt_logprobs=of_prompt,
        echo_logprobs=logprobs,
        echo=echo,
        tokens_as_ids=_flag(raw, "return_tokens_as_token_ids"),
        return_token_ids=_flag(raw, "return_token_ids"),
    )


def require_temperature(value: object) -> None:
    """Raise RefusedRequestError unless it is 1, or 0, which is about the generated token alone."""
    if value is None or (type(value) in (int, float) and value in (0, 1)):
        return
    raise RefusedRequestError(
        "temperature: the cache has log-probabilities at temperature 1, and those at another cannot be told from its "
        "top k: send 1 (or 0), and scale nothing by it in the trainer"
    )


def answer_completions(
    request: CompletionsRequest, *, cache: ReplayCache, tokens: Tokens, model: str, now: int, answer_id: str
) -> tuple[bytes, int]:
    """The body of the answer, and how many positions it tells of. Raises as `ReplayCache.rows` does."""
    choices: list[str] = []
    search = Search()
    n_positions = 0
    for number, ids_L in enumerate(request.prompts):
        k = max(request.prompt_logprobs, request.echo_logprobs or 0)
        rows = cache.rows(ids_L, first=0, k=k, name=f"prompt {number}", search=search)
        n_positions += len(rows.tokens_M)
        choices.append(_choice(number, rows, request, tokens))
    n_tokens = sum(map(len, request.prompts))
    head = json.dumps({"id": answer_id, "object": "text_completion", "created": now, "model": model})[:-1]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    tail = json.dumps({"usage": usage, "kv_transfer_params": None})[1:]
    return f'{head}, "choices": [{", ".join(choices)}], {tail}'.encode(), n_positions


def _choice(number: int, rows: Rows, request: CompletionsRequest, tokens: Tokens) -> str:
    ids = rows.ids_L.tolist()
    text = ""
    if request.echo and not request.return_token_ids:
        text = request.texts[number] or ("" if request.tokens_as_ids else tokens.decode(ids))
    fields: dict[str, Any] = {
        "index": number,
        "text": text,
        "logprobs": None
        if request.echo_logprobs is None
        else _echoed_logprobs(rows, request.echo_logprobs, tokens, as_ids=request.tokens_as_ids),
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [] if request.return_token_ids else None,
        "prompt_token_ids": ids if request.return_token_ids else None,
    }
    of_prompt = prompt_logprobs_json(rows, k=request.prompt_logprobs, tokens=tokens)
    return f'{json.dumps(fields)[:-1]}, "prompt_logprobs": {of_prompt}}}'


def prompt_logprobs_json(rows: Rows, *, k: int, tokens: Tokens) -> str:
    """A JSON list with an element for each token: null of the first, and of rows that are not kept."""
    elements = ["null"] * len(rows.ids_L)
    decoded = tokens.decoded_json
    own_ids = rows.ids_L[rows.tokens_M].tolist()
    top_ids = rows.topk_ids_Mk[:, : max(k, 1)].tolist()
    top_texts = float16_texts()[rows.topk_logprobs_Mk[:, : max(k, 1)].view(np.uint16)].tolist()
    for token, own_id, own_text, rank, known, outside, row_ids, row_texts in zip(
        rows.tokens_M.tolist(),
        own_ids,
        own_logprob_texts(rows),
        rows.target_rank_M.tolist(),
        rows.target_in_topk_M.tolist(),
        _outside_mass_fields(rows),
        top_ids,
        top_texts,
        strict=True,
    ):
        bound = "" if known else ',"rank_is_lower_bound":true'
        entries = [
            f'"{own_id}":{{"logprob":{own_text},"rank":{rank}{bound}{outside},"decoded_token":{decoded(own_id)}}}'
        ]
        if k:
            entries += [
                f'"{i}":{{"logprob":{text},"rank":{at},"decoded_token":{decoded(i)}}}'
                for at, (i, text) in enumerate(zip(row_ids, row_texts, strict=True), start=1)
                if at != rank
            ]
        elements[token] = f"{{{','.join(entries)}}}"
    return f"[{','.join(elements)}]"


def _outside_mass_fields(rows: Rows) -> list[str]:
    if rows.outside_mass_M is None:
        return [""] * len(rows.tokens_M)
    return [f',"outside_mass":{_number(mass)}' for mass in rows.outside_mass_M.tolist()]


def own_logprob_texts(rows: Rows) -> list[str]:
    """The sequence's own log-probabilities as JSON: of a token among the top k what the top k says, so that numbers
    fall with their ranks; of others the cache's own number of it, in float32."""
    at_M = np.minimum(rows.target_rank_M - 1, rows.topk_logprobs_Mk.shape[1] - 1)
    among = float16_texts()[rows.topk_logprobs_Mk[np.arange(len(at_M)), at_M].view(np.uint16)].tolist()
    apart, is_known = rows.target_logprob_M.tolist(), rows.target_in_topk_M.tolist()
    return [a if known else _number(b) for a, b, known in zip(among, apart, is_known, strict=True)]


@cache
def float16_texts() -> npt.NDArray[np.object_]:
    """Object [65536]: every float16 as a JSON number, by its bits. They are few, and writing a number out is slow."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64).tolist()
    return np.array([_number(number) for number in numbers], dtype=object)


def _number(value: float) -> str:
    if math.isnan(value):
        return "null"  # no committed cache has one: it fails the check `finite`
    return repr(max(min(value, -LOWEST_LOGPROB), LOWEST_LOGPROB))


def _echoed_logprobs(rows: Rows, k: int, tokens: Tokens, *, as_ids: bool) -> dict[str, Sequence[object]]:
    """Log-probabilities of an echoed prompt as OpenAI's API has them: by text, or `token_id:<id>`."""

    def named(token_id: int) -> str:
        return f"token_id:{token_id}" if as_ids else tokens.decode([token_id])

    words = [named(i) for i in rows.ids_L.tolist()]
    own: list[float | None] = [None] * len(words)
    top: list[dict[str, float] | None] = [None] * len(words)
    texts = own_logprob_texts(rows)
    for row, token in enumerate(rows.tokens_M.tolist()):
        own[token] = float(texts[row])
        ids, logprobs = rows.topk_ids_Mk[row, :k].tolist(), rows.topk_logprobs_Mk[row, :k].tolist()
        best = {named(i): max(logprob, LOWEST_LOGPROB) for i, logprob in zip(ids, logprobs, strict=True)}
        top[token] = {words[token]: float(texts[row])} | best
    offsets = np.cumsum([0, *map(len, words[:-1])]).tolist()
    return {"text_offset": offsets, "token_logprobs": own, "tokens": words, "top_logprobs": top}


def _prompts(
    value: object, *, cache: ReplayCache, tokens: Tokens, limits: Limits, special: bool
) -> tuple[list[Uint32Array], list[str | None]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RefusedRequestError("prompt is missing or empty: send token ids, lists of token ids, text or texts")
    if not isinstance(value[0], (list, str)):
        return [token_ids(value, "prompt", vocabulary=cache.vocabulary)], [None]
    if len(value) > limits.sequences:
        raise RefusedRequestError(f"{len(value)} prompts, and a request has at most {limits.sequences}", status=413)
    prompts: list[Uint32Array] = []
    texts: list[str | None] = []
    for number, prompt in enumerate(value):
        if isinstance(prompt, str) and isinstance(value[0], str):
            ids = tokens.encode(prompt, add_special_tokens=special).tolist()
        else:
            ids = prompt
        prompts.append(token_ids(ids, f"prompt[{number}]", vocabulary=cache.vocabulary))
        texts.append(prompt if isinstance(prompt, str) else None)
    return prompts, texts


def _require_no_generation(raw: Mapping[str, Any]) -> None:
    n = raw.get("max_tokens", 16)  # OpenAI's default
    if type(n) is not int or n not in (0, 1):
        raise RefusedRequestError(
            "max_tokens (16 where it is not said) asks for generated tokens, and a cache has none: send 0 or 1"
        )


def _count_or_none(raw: Mapping[str, Any], name: str, cache: ReplayCache) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    k = whole_number(value, name)
    cache.require_k(k)
    return k


def _flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RefusedRequestError(f"{name} is not true or false")
    return value


def model_list(names: ModelNames, *, longest: int, created: int) -> dict[str, Any]:
    """The body of `/v1/models`."""
    return {"object": "list", "data": [_model(name, names.known[0], longest, created) for name in names.known]}


def _model(name: str, root: str, longest: int, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "kd-assets",
        "root": root,
        "parent": None,
        "max_model_len": longest,
        "permission": [],
    }


def error_body(message: str, *, status: int) -> bytes:
    """An error as vLLM says it."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 413: "BadRequestError", 503: "ServiceUnavailableError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
