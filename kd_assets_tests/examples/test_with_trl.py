"""TRL's own trainer learns from a cache behind the replay server, judged by the teacher's full distributions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kd_assets.contract import PositionChoice
from kd_assets.errors import InputError
from kd_assets_tests.examples.conftest import Made, made_at
from kd_assets_tests.examples.test_examples import full_kl, run, setting
from kd_assets_tests.replay.servers import Server, served

pytestmark = pytest.mark.filterwarnings("ignore")
"""TRL warns of what it sets itself."""

STEPS = 120

NEEDED = ("datasets", "requests", "starlette", "uvicorn", "prometheus_client", "trl")
"""A node has no server."""


class OneRowOff(LlamaForCausalLM):  # type: ignore[misc]
    """A model that gives every token the prediction of the one before."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.roll(1, 1)
        return out


@pytest.fixture(scope="module")
def server(made: Made) -> Iterator[Server]:
    for name in NEEDED:
        pytest.importorskip(name)
    with served(made.recipe_folder) as running:
        yield running


def trained(student: Any, made: Made, server: Server, to: Path, *, steps: int) -> tuple[float, float]:
    from kd_assets.examples import with_trl

    _, documents, held_out = setting(made)
    return with_trl.train(student, documents, held_out, to=to, steps=steps, server=server.url)


def test_a_student_comes_near_to_the_teacher_on_documents_it_has_not_seen(
    made: Made, server: Server, tmp_path: Path
) -> None:
    student, _, held_out = setting(made)
    before = full_kl(made, student, held_out)
    said_before, said_after = trained(student, made, server, tmp_path, steps=STEPS)
    after = full_kl(made, AutoModelForCausalLM.from_pretrained(tmp_path), held_out)
    assert after < before / 3
    # TRL's loss takes all ids outside of the top k as one: less than the whole divergence, but not by much.
    for said, true in ((said_before, before), (said_after, after)):
        assert 0.3 * true < said <= 1.15 * true
    metrics = server.metrics()
    assert metrics["kd_replay_positions_total"] > 10_000
    assert metrics["kd_replay_misses_total"] == 0


def test_trls_loss_of_the_teacher_as_student_is_nothing_and_much_where_rows_are_one_off(
    made: Made, server: Server, tmp_path: Path
) -> None:
    losses = []
    for kind in (AutoModelForCausalLM, OneRowOff):
        teacher = kind.from_pretrained(made.teacher, dtype=torch.float32)
        losses.append(trained(teacher, made, server, tmp_path, steps=1)[0])
    assert losses[0] < 1e-4, "what float16 leaves of log-probabilities"
    assert losses[1] > 1_000 * losses[0]


def test_it_runs_as_its_docstring_says(made: Made, server: Server, tmp_path: Path) -> None:
    out = run(
        *("-W", "ignore", "-m", "kd_assets.examples.with_trl", str(made.recipe_folder), "--to", str(tmp_path)),
        *("--server", server.url, "--steps", "30"),
    )
    before, after = map(float, re.findall(r"KL divergence .*: (\S+) before, (\S+) after", out)[0])
    assert after < before / 1.5


def sample(loss_mask: list[int], positions: list[int] | None = None) -> dict[str, Any]:
    found = {"document_id": "d", "partition_key": "p", "input_ids": torch.arange(10, 10 + len(loss_mask))}
    kept = {} if positions is None else {"topk_positions": torch.tensor(positions)}
    return {**found, "loss_mask": torch.tensor(loss_mask, dtype=torch.bool), **kept}


def test_completions_are_the_runs_of_learned_tokens_and_nothing_that_is_not_learned() -> None:
    for name in NEEDED:
        pytest.importorskip(name)
    from kd_assets.examples.with_trl import as_prompts

    documents: Any = [sample([1, 0, 1, 1, 0, 0, 1, 0]), sample([0, 0, 0]), sample([1]), sample([1, 1], [0])]
    assert [tuple(row["prompt"].values()) for row in as_prompts(documents)] == [
        ([10, 11], [12, 13]),
        ([10, 11, 12, 13, 14, 15], [16]),
        ([10], [11]),
    ]


def test_a_learned_token_whose_row_is_not_kept_is_named_before_anything_is_asked() -> None:
    for name in NEEDED:
        pytest.importorskip(name)
    from kd_assets.examples.with_trl import as_prompts

    as_prompts([sample([0, 1, 1, 0, 1], [0, 1, 3])])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="document 'd' of partition 'p' learns its token 2, and the top-k cache keeps"):
        as_prompts([sample([0, 1, 1, 0, 1], [0, 3])])  # type: ignore[arg-type]


def test_a_cache_of_learned_positions_is_learned_from_where_tokens_between_and_after_are_not(tmp_path: Path) -> None:
    for name in NEEDED:
        pytest.importorskip(name)
    gaps = made_at(tmp_path, documents_of_a_shard=40, positions=PositionChoice(kept="learned"), learned=with_gaps)
    with served(gaps.recipe_folder, "--not-kept", "null") as running:
        losses = []
        for kind in (AutoModelForCausalLM, OneRowOff):
            teacher = kind.from_pretrained(gaps.teacher, dtype=torch.float32)
            losses.append(trained(teacher, gaps, running, tmp_path / "student", steps=1)[0])
        assert running.metrics()["kd_replay_misses_total"] == 0
    assert losses[0] < 1e-4
    assert losses[1] > 1_000 * losses[0]


def with_gaps(n_tokens: int) -> npt.NDArray[np.bool_]:
    return np.arange(n_tokens) % 7 > 2
