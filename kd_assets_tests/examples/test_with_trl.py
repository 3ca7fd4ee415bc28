"""TRL's own trainer learns from a cache behind the replay server, judged by the teacher's full distributions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kd_assets_tests.examples.conftest import Made
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
