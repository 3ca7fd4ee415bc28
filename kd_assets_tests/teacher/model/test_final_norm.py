"""The end of a decoder: which module is the final norm, and which states are what their columns say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd_assets.contract import HiddenStateParams
from kd_assets.errors import TeacherError
from kd_assets.teacher.batch.engine import Engine, Step
from kd_assets.teacher.batch.forward import run_forward
from kd_assets.teacher.model.load import as_teacher, check_teacher
from kd_assets_tests.teacher.tiny import N_BLOCKS, VOCABULARY, save_teacher, tiny_model, tiny_params

CPU = torch.device("cpu")
IDS_BT = np.arange(24).reshape(2, 12) * 7 % VOCABULARY
ROWS_N = np.arange(24)


def test_final_norm_is_found_by_what_it_does() -> None:
    model = tiny_model()
    end = as_teacher(model, device=CPU).end
    assert end.norm is model.model.norm
    assert not end.unusable


def test_a_projection_after_the_norm_is_no_norm() -> None:
    """As OPT-350m has one."""
    model = tiny_model("opt")
    decoder = model.model.decoder
    decoder.project_out = nn.Linear(decoder.config.hidden_size, decoder.config.hidden_size, bias=False)
    end = as_teacher(model, device=CPU).end
    assert end.norm is None
    assert {"before_norm", "after_norm"} == set(end.unusable)
    assert "does not end in a norm (Linear comes last)" in end.unusable["after_norm"]


def test_decoder_without_a_final_norm_has_no_final_states() -> None:
    model = tiny_model("opt")
    model.model.decoder.final_layer_norm = None
    end = as_teacher(model, device=CPU).end
    assert end.norm is None
    assert "does not end in a norm" in end.unusable["before_norm"]


def test_what_stands_between_the_last_block_and_the_norm_is_noticed() -> None:
    model = tiny_model()
    norm = model.model.norm
    norm.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))
    end = as_teacher(model, device=CPU).end
    assert end.norm is norm
    assert end.unusable["before_norm"] == "something stands between its last block and its final norm"


def test_what_stands_between_the_norm_and_the_head_is_noticed() -> None:
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    end = as_teacher(model, device=CPU).end
    assert set(end.unusable) == {"after_norm"}


def test_final_state_that_cannot_be_kept_is_refused_in_words(tmp_path: Any) -> None:
    folder = save_teacher(tmp_path / "teacher", "minicpm3")
    teacher = as_teacher(tiny_model("minicpm3"), device=CPU)
    hidden = HiddenStateParams(blocks=(), max_length=8, final=("after_norm",))
    with pytest.raises(TeacherError, match=r"after_norm of .* cannot be kept .*goes into its head.*leave it out"):
        check_teacher(tiny_params(folder, hidden_states=hidden), teacher)
    hidden = HiddenStateParams(blocks=(), max_length=8, final=("before_norm",))
    check_teacher(tiny_params(folder, hidden_states=hidden), teacher)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mamba", "modernbert_decoder"])
def test_final_states_are_equal_bit_for_bit_whatever_else_is_kept(architecture: str) -> None:
    engine = Engine(as_teacher(tiny_model(architecture, dtype=torch.bfloat16), device=CPU))
    both = Step(ids_BT=IDS_BT, blocks=(0, N_BLOCKS - 1), final=("before_norm", "after_norm"), rows_N=ROWS_N)
    found = engine.run(both).blocks
    pooled = np.full(2, 12, dtype=np.int64)
    for step in (
        Step(ids_BT=IDS_BT, final=("before_norm",), rows_N=ROWS_N),
        Step(ids_BT=IDS_BT, final=("after_norm",), rows_N=ROWS_N),
        Step(ids_BT=IDS_BT, blocks=(0,), rows_N=ROWS_N),
        Step(ids_BT=IDS_BT, final=("before_norm",), rows_N=ROWS_N, pooled_lengths_B=pooled),
    ):
        for state, states in engine.run(step).blocks.items():
            assert torch.equal(states.bits_NH, found[state].bits_NH), state
    assert torch.equal(found["before_norm"].bits_NH, found[N_BLOCKS - 1].bits_NH)
    assert not torch.equal(found["after_norm"].bits_NH, found["before_norm"].bits_NH)


def test_pass_ends_before_the_norm_where_nothing_above_is_kept() -> None:
    model = tiny_model()
    teacher = as_teacher(model, device=CPU)
    ran: list[str] = []
    model.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    ids_BT = torch.from_numpy(IDS_BT)
    states = run_forward(teacher, ids_BT, blocks=(), needs_final=False, before_norm=True)
    assert states.before_norm_FH is not None
    assert states.final_FH is None
    assert ran == []
    Engine(teacher).run(Step(ids_BT=IDS_BT, final=("after_norm",), rows_N=ROWS_N))
    assert ran == ["norm"]


def test_blocks_alone_still_end_the_pass_at_the_highest_of_them() -> None:
    model = tiny_model()
    teacher = as_teacher(model, device=CPU)
    ran: list[int] = []
    for n, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda *_, n=n: ran.append(n))
    Engine(teacher).run(Step(ids_BT=IDS_BT, blocks=(0,), rows_N=ROWS_N))
    assert ran == [0]


def test_no_hook_is_left_on_the_norm() -> None:
    model = tiny_model()
    Engine(as_teacher(model, device=CPU)).run(Step(ids_BT=IDS_BT, final=("before_norm",), rows_N=ROWS_N))
    assert not model.model.norm._forward_pre_hooks
    assert not model.model.norm._forward_hooks
