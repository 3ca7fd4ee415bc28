"""Clients of vLLM's and of TRL's server, by their own code, against the replay server of a real, tiny teacher's cache.

The client of `trl` as it is installed, the one of TRL 1.6, which asks `/get_sequence_logprobs/` (its folder is in
`TRL_WITH_OWN_SERVER`), and `openai`. `-s` shows the rows of the table: the teacher's divergence from what was answered,
and the same with rows shifted by one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_assets.contract import PositionChoice, TopkParams
from kd_assets_tests.replay.servers import TOKEN, Server, served
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of what the consumers' own code warns of: it is not this project's to mend."""

VOCABULARY = K = 48
"""All of the vocabulary, so that the divergence is that of whole distributions."""
LENGTHS = [2, 7, 19, 33, 40]
PROMPT_LENGTHS = [1, 3, 5, 20, 1]

_ASKED_BY_TRL_1_6 = """
import json, sys
from trl.generation import vllm_client
vllm_client.is_vllm_available = lambda *_: True
url, asked = sys.argv[1], json.loads(sys.argv[2])
client = vllm_client.VLLMClient(base_url=url)
print(json.dumps([client.get_sequence_logprobs(**asked, use_binary=binary) for binary in (True, False)]))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taught:
    teacher: Any
    recipe_folder: Path
    documents: list[list[int]]

    @torch.no_grad()
    def divergence(self, said: dict[str, Any], *, shift: int = 0) -> float:
        """The largest KL(answered ‖ teacher) of a completion's token, in nats, by a forward pass of its own."""
        worst = 0.0
        for ids, first, logprobs, of_ids in zip(
            self.documents, PROMPT_LENGTHS, said["logprobs"], said["logprob_token_ids"], strict=True
        ):
            dense_LV = self.teacher(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).roll(shift, 0)
            assert len(logprobs) == len(of_ids) == len(ids) - first
            for token, (row, row_ids) in enumerate(zip(logprobs, of_ids, strict=True), start=first):
                p = torch.tensor(row, dtype=torch.float64)
                q = dense_LV[token - 1][torch.tensor(row_ids)]
                worst = max(worst, (p.exp() * (p - q)).sum().item())
        return worst


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("replay")
    teacher = save_teacher(folder / "teacher", vocab_size=VOCABULARY, initializer_range=0.2)
    documents = tiny_documents(LENGTHS, vocabulary=VOCABULARY)
    desk = Desk(folder)
    params = tiny_params(teacher, topk=TopkParams(k=K, max_length=64), hidden_states=None, embeddings=None)
    desk.run(params, desk.unit(desk.commit_shard(documents), params, assets=("topk_cache",)))
    ids = np.split(documents.input_ids, documents.offsets[1:-1])
    return Taught(
        teacher=AutoModelForCausalLM.from_pretrained(teacher).eval(),
        recipe_folder=desk.recipe_folder,
        documents=[document.tolist() for document in ids],
    )


@pytest.fixture(scope="module")
def server(taught: Taught) -> Iterator[Server]:
    with served(taught.recipe_folder) as running:
        yield running


def require_taught(taught: Taught, said: dict[str, Any], reader: str) -> None:
    true, off = taught.divergence(said), taught.divergence(said, shift=1)
    print(f"\n| replay | {reader} | {true:.2g} | {off:.2g} |")
    assert true < 1e-3
    assert off > 100 * true


def trl_client(url: str) -> Any:
    client = pytest.importorskip("trl.generation.vllm_client")
    # It wants vLLM on this machine, too, which it needs to send weights to a server, and for nothing else.
    client.is_vllm_available = lambda *_: True
    return client.VLLMClient(base_url=url)


def asked_by_trl(taught: Taught) -> dict[str, Any]:
    return {"sequences": taught.documents, "prompt_lengths": PROMPT_LENGTHS, "top_logprobs": K, "temperature": 1.0}


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_trls_client_reads_the_teachers_distributions(taught: Taught, server: Server, chunk_size: int) -> None:
    client = trl_client(server.url)
    said = client.get_sequence_logprobs(**asked_by_trl(taught), chunk_size=chunk_size)
    require_taught(taught, said, f"trl {version('trl')}")
    for document, first, ids in zip(taught.documents, PROMPT_LENGTHS, said["actual_token_ids"], strict=True):
        assert [i for (i,) in ids] == document[first:]
    assert all(np.isfinite(of).all() for of in said["actual_logprobs"])


@pytest.mark.parametrize("k", [1, 3])
def test_trls_client_finds_the_best_k_and_the_real_token_outside_of_them(
    taught: Taught, server: Server, k: int
) -> None:
    client = trl_client(server.url)
    said, whole = (client.get_sequence_logprobs(**asked_by_trl(taught) | {"top_logprobs": n}) for n in (k, K))
    for few, all_of_it in zip(said["logprob_token_ids"], whole["logprob_token_ids"], strict=True):
        assert few == [row[:k] for row in all_of_it]
    assert said["actual_logprobs"] == whole["actual_logprobs"]


def test_trls_client_reads_completions_of_a_cache_that_keeps_no_prompts(taught: Taught, tmp_path: Path) -> None:
    documents = tiny_documents(LENGTHS, vocabulary=VOCABULARY)
    learned = np.concatenate([np.arange(n) >= first for n, first in zip(LENGTHS, PROMPT_LENGTHS, strict=True)])
    desk = Desk(tmp_path)
    topk = TopkParams(k=K, max_length=64, positions=PositionChoice(kept="learned"))
    folder = save_teacher(tmp_path / "teacher", vocab_size=VOCABULARY, initializer_range=0.2)
    params = tiny_params(folder, topk=topk, hidden_states=None, embeddings=None)
    shard = desk.commit_shard(dataclasses.replace(documents, loss_mask=learned))
    desk.run(params, desk.unit(shard, params, assets=("topk_cache",)))
    with served(desk.recipe_folder) as refusing:
        with pytest.raises(Exception, match=r"404.* start the server with `--not-kept null`"):
            trl_client(refusing.url).get_sequence_logprobs(**asked_by_trl(taught))
    with served(desk.recipe_folder, "--not-kept", "null") as server:
        said = trl_client(server.url).get_sequence_logprobs(**asked_by_trl(taught))
        require_taught(taught, said, f"trl {version('trl')}, learned positions")


def test_trls_client_is_told_what_is_not_in_the_cache(taught: Taught, server: Server) -> None:
    client = trl_client(server.url)
    asked = asked_by_trl(taught)
    with pytest.raises(Exception, match=r"Request failed: 404, .*prompt 0 \(2 token ids\) is not in the top-k cache"):
        client.get_sequence_logprobs(**asked | {"sequences": [[1, 1], *taught.documents[1:]]})
    with pytest.raises(Exception, match=r"Request failed: 400, .*the 49 most probable tokens are asked for"):
        client.get_sequence_logprobs(**asked | {"top_logprobs": K + 1})
    with pytest.raises(Exception, match=r"Request failed: 400, .*temperature"):
        client.get_sequence_logprobs(**asked | {"temperature": 0.5})


def test_trls_client_sends_a_token_that_stands_in_the_address(taught: Taught) -> None:
    with served(taught.recipe_folder, token=TOKEN) as server:
        with pytest.raises(Exception, match="401"):
            trl_client(server.url)
        client = trl_client(server.url.replace("//", f"//any:{TOKEN}@"))
        require_taught(taught, client.get_sequence_logprobs(**asked_by_trl(taught)), f"trl {version('trl')}, token")


def test_the_client_of_trls_own_server_reads_both_formats(taught: Taught, server: Server) -> None:
    folder = os.environ.get("TRL_WITH_OWN_SERVER")
    if folder is None:
        pytest.skip("TRL_WITH_OWN_SERVER names no folder with trl 1.6")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ASKED_BY_TRL_1_6, server.url, json.dumps(asked_by_trl(taught))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": folder},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    binary, lists = json.loads(done.stdout.splitlines()[-1])
    require_taught(taught, binary, "trl 1.6.0 binary")
    require_taught(taught, lists, "trl 1.6.0 json")
    for document, first, ids in zip(taught.documents, PROMPT_LENGTHS, binary["actual_token_ids"], strict=True):
        assert [i for (i,) in ids] == document[first:]


def test_openais_client_reads_what_vllm_adds_to_its_answers(taught: Taught) -> None:
    openai = pytest.importorskip("openai")
    with served(taught.recipe_folder, token=TOKEN) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
        model = client.models.list().data[0].id
        said = client.completions.create(
            model=model, prompt=taught.documents, max_tokens=1, extra_body={"prompt_logprobs": K}
        )
        found: dict[str, Any] = {"logprobs": [], "logprob_token_ids": []}
        for choice, first in zip(said.choices, PROMPT_LENGTHS, strict=True):
            rows = choice.prompt_logprobs[first:]
            found["logprobs"].append([[entry["logprob"] for entry in row.values()] for row in rows])
            found["logprob_token_ids"].append([[int(i) for i in row] for row in rows])
        require_taught(taught, found, f"openai {version('openai')}")
        assert said.usage.prompt_tokens == sum(LENGTHS)
        with pytest.raises(openai.NotFoundError, match="is not in the top-k cache"):
            client.completions.create(model=model, prompt=[1, 1], max_tokens=1, extra_body={"prompt_logprobs": 1})
        with pytest.raises(openai.BadRequestError, match="asks for generated tokens"):
            client.completions.create(model=model, prompt=taught.documents[0])
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).models.list()
