"""A program of `test_ranks`: one rank of two, which compares teachers split over both with the same in one piece.

`python -m kd_assets_tests.teacher.split_teachers FOLDER RANK ARCHITECTURE...`; rank 0 prints a line of JSON for each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_assets.contract import TokenIds
from kd_assets.errors import TeacherError
from kd_assets.model_files.placement import Placement
from kd_assets.teacher.batch.engine import Engine, Step, StepResult, TopkStep
from kd_assets.teacher.devices.rank_group import join_group, leave_group
from kd_assets.teacher.devices.teacher_on_devices import Rank, load_rank, prove_whole
from kd_assets.teacher.model.load import load_teacher
from kd_assets_tests.teacher.tiny import N_BLOCKS, VOCABULARY, tiny_params

CUT_TO = VOCABULARY - 30
BOTH = Placement(kind="tensor_parallel", n_devices=2, n_processes=1, reason="this test")


def a_step() -> Step:
    ids_BT = np.random.default_rng(0).integers(0, VOCABULARY, (3, 20))
    return Step(
        ids_BT=ids_BT,
        blocks=tuple(range(N_BLOCKS)),
        final=("before_norm", "after_norm"),
        rows_N=np.arange(60),
        pooled_lengths_B=np.array([20, 7, 1]),
        topk=TopkStep(k=4, rows_M=np.arange(59), targets_M=ids_BT.ravel()[1:]),
    )


def a_cut_step() -> Step:
    """The same with distributions over some of the ids, its targets among them."""
    step = a_step()
    assert step.topk is not None
    cut = dataclasses.replace(
        step.topk,
        targets_M=step.topk.targets_M % CUT_TO,
        token_ids=TokenIds.of([*range(CUT_TO), VOCABULARY - 1]),
    )
    return dataclasses.replace(step, topk=cut)


def bfloat16(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()


def difference(ours: StepResult, theirs: StepResult) -> dict[str, float]:
    """How far a step's results are apart, relative to the largest number."""
    assert ours.topk is not None
    assert theirs.topk is not None
    assert ours.pooled is not None
    assert theirs.pooled is not None
    pairs = {
        f"block {n}": (bfloat16(ours.blocks[n].bits_NH), bfloat16(theirs.blocks[n].bits_NH)) for n in theirs.blocks
    }
    pairs |= {
        "mean": (ours.pooled.mean_BH, theirs.pooled.mean_BH),
        "last": (ours.pooled.last_BH, theirs.pooled.last_BH),
        "logsumexp": (ours.topk.logsumexp_M, theirs.topk.logsumexp_M),
        "target": (ours.topk.target_logprob_M, theirs.topk.target_logprob_M),
        "logprobs": (ours.topk.logprobs_Mk.float(), theirs.topk.logprobs_Mk.float()),
    }
    if ours.topk.outside_mass_M is not None and theirs.topk.outside_mass_M is not None:
        pairs["outside mass"] = ours.topk.outside_mass_M, theirs.topk.outside_mass_M
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def compare(folder: Path, device: torch.device) -> dict[str, Any]:
    params = tiny_params(folder)
    split = load_rank(params, BOTH, folder / "digests.json", device=device)
    ours = split.run(("step", a_step()))
    plain = split.run(("reference", np.arange(9, dtype=np.uint32), (0,), None))
    whole = Rank(
        teacher=(teacher := load_teacher(params, digests=None, warn=lambda message: None)), engine=Engine(teacher)
    )
    theirs = whole.run(("step", a_step()))
    ours_cut, theirs_cut = (rank.run(("step", a_cut_step())) for rank in (split, whole))
    plain_of_whole = whole.run(("reference", np.arange(9, dtype=np.uint32), (0,), None))
    assert isinstance(ours, StepResult)
    assert isinstance(theirs, StepResult)
    assert isinstance(ours_cut, StepResult)
    assert isinstance(theirs_cut, StepResult)
    assert not isinstance(plain, StepResult)
    assert not isinstance(plain_of_whole, StepResult)
    return {
        "head": split.teacher.head is not None,
        "n_parameters": [split.teacher.n_parameters, whole.teacher.n_parameters],
        "differences": difference(ours, theirs)
        | {f"{name} of a cut step": value for name, value in difference(ours_cut, theirs_cut).items()}
        | {"reference": float((plain.logits_PV - plain_of_whole.logits_PV).abs().max())},
    }


def refused(folder: Path, device: torch.device, rank: int) -> str:
    """What is said of a teacher one of whose ranks holds part of a state only."""
    teacher = load_rank(tiny_params(folder), BOTH, folder / "digests.json", device=device).teacher
    if rank == 1:
        teacher.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5)
    try:
        prove_whole(teacher)
    except TeacherError as e:
        return str(e)
    return "nothing"


def main(folder: Path, rank: int, architectures: list[str]) -> None:
    torch.set_num_threads(1)
    device = join_group(rank, 2, folder / "store")
    for architecture in architectures:
        found = compare(folder / architecture, device)
        if rank == 0:
            print(json.dumps({"architecture": architecture, **found}), flush=True)
    said = refused(folder / architectures[0], device, rank)
    print(json.dumps({"refused_by": rank, "said": said}), flush=True)
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
