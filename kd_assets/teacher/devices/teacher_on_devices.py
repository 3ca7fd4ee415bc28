"""A teacher that is ready to run: placed on the devices of its process, loaded, and told what to run as one.

Used by the runner, which does not see whether one process holds it or several (see `rank_group`), on one device or
layer by layer on several. The invariant: whatever runs the model runs here, on all ranks alike, so that none waits for
an operation that another never begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kd_assets.contract import FinalState, TeacherParams
from kd_assets.errors import TeacherError
from kd_assets.model_files.digests import DigestCache
from kd_assets.model_files.folder import model_folder
from kd_assets.model_files.placement import ONE_DEVICE, Placement, place
from kd_assets.model_files.size import GIB, teacher_size
from kd_assets.teacher.batch.engine import Engine, Step, StepResult
from kd_assets.teacher.devices.rank_group import RankCommand, RankGroup, join_group
from kd_assets.teacher.model.anatomy import CAUSAL_RTOL, probe_ids, tapped
from kd_assets.teacher.model.configuration import keep_to_this_machine, read_config
from kd_assets.teacher.model.head import relative_difference
from kd_assets.teacher.model.load import Teacher, Warn, load_teacher
from kd_assets.teacher.recompute import Int64Array, Reference, reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What each process of a teacher holds, and does when told."""

    teacher: Teacher
    engine: Engine

    def run(self, command: RankCommand) -> StepResult | Reference:
        """A command as rank 0 sends it."""
        match command:
            case ("step", step):
                return self.engine.run(step)
            case ("reference", *arguments):
                return reference(self.teacher, *arguments)
        raise ValueError(f"no command of ours: {command[0]!r}")


def load_rank(
    params: TeacherParams,
    placement: Placement,
    digests: Path,
    *,
    device: torch.device,
    warn: Warn = lambda message: None,
) -> Rank:
    """Load this process's part of a teacher. Every rank calls it, in step with the others."""
    try:
        teacher = load_teacher(params, digests=DigestCache(digests), warn=warn, placement=placement, device=device)
        if placement.kind == "tensor_parallel":
            prove_whole(teacher)
    except TeacherError as e:
        if placement.kind != "tensor_parallel" or type(e) is not TeacherError:
            raise
        raise TeacherError(
            f"{e} [loaded by tensor parallelism over {placement.n_devices}: where it can be loaded without, set "
            "teacher.placement to device_map]"
        ) from e
    return Rank(teacher=teacher, engine=Engine(teacher))


class TeacherOnDevices:
    """A loaded teacher. Close it: it may have processes."""

    def __init__(
        self,
        params: TeacherParams,
        *,
        digests: Path,
        warn: Warn,
        report_fatal: Callable[[Exception], None],
        teacher: Teacher | None = None,
    ) -> None:
        """Place and load the teacher of a recipe. `report_fatal`: see `contract.Reporter`; `teacher`: one that lies
        on its device already, for measuring a teacher that no file holds.

        Raises what `load_teacher` raises, RecipeError for a placement that cannot be, RankLostError when one of several
        processes ends meanwhile.
        """
        self.placement = placement = placement_here(params) if teacher is None else ONE_DEVICE
        if message := unused(placement, torch.cuda.device_count()):
            warn(message)
        self._ranks: RankGroup | None = None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            if placement.kind == "tensor_parallel":
                self._ranks = RankGroup(placement.n_devices, (params, placement, digests), report_fatal=report_fatal)
            with self._ranks.together(None) if self._ranks is not None else nullcontext():
                if self._ranks is not None:
                    device = join_group(0, self._ranks.n_ranks, self._ranks.store_file)
                if teacher is None:
                    self._rank = load_rank(params, placement, digests, device=device, warn=warn)
                else:
                    self._rank = Rank(teacher=teacher, engine=Engine(teacher))
        except BaseException:
            self.close()
            raise

    @property
    def teacher(self) -> Teacher:
        return self._rank.teacher

    @property
    def normaliser(self) -> str:
        """See `engine.Engine`."""
        return self._rank.engine.normaliser

    @property
    def is_shared(self) -> bool:
        """Whether other processes take part: then nothing goes on after an error in the middle of a step."""
        return self._ranks is not None

    def run_step(self, step: Step) -> StepResult:
        """Launch a step (see `engine.Engine`)."""
        result = self._run(("step", step))
        assert isinstance(result, StepResult)
        return result

    def reference(
        self,
        input_ids_L: npt.NDArray[np.uint32],
        blocks: Sequence[int],
        positions_P: Int64Array | None = None,
        final: Sequence[FinalState] = (),
    ) -> Reference:
        """A document by the plain path (see `recompute.reference`)."""
        result = self._run(("reference", input_ids_L, tuple(blocks), positions_P, tuple(final)))
        assert isinstance(result, Reference)
        return result

    def _run(self, command: RankCommand) -> StepResult | Reference:
        if self._ranks is None:
            return self._rank.run(command)
        with self._ranks.together(command):
            return self._rank.run(command)

    def close(self) -> None:
        """End the other processes, if any."""
        if self._ranks is not None:
            self._ranks.close()


# ------------------------------------------------------------------------------------------------------- placement


def placement_here(params: TeacherParams) -> Placement:
    """How the teacher lies on the devices that this process sees."""
    n_gpus = torch.cuda.device_count()
    if params.placement in ("auto", "one_device") and params.n_devices in (None, 1) and n_gpus < 2:
        return ONE_DEVICE  # whatever it weighs; its files are looked at when they are loaded
    keep_to_this_machine(remote_code=params.trust_remote_code)
    folder = model_folder(params.model, params.revision)
    memory = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(n_gpus)]
    placement = place(
        teacher_size(folder, dtype=params.dtype, quantization=params.quantization, has_plan=has_plan(params, folder)),
        n_gpus=n_gpus,
        gpu_memory_gib=min(memory, default=0.0),
        wanted=params.placement,
        n_devices=params.n_devices,
        n_processes=1,
    )
    assert placement is not None, "the memory of GPUs is known here"
    return placement


def has_plan(params: TeacherParams, folder: Path) -> bool | None:
    """Whether transformers has a tensor-parallel plan for the teacher. A model whose own code may run is not asked
    before its fingerprint is checked; it is taken to have one only where the recipe says tensor_parallel."""
    if params.trust_remote_code:
        return None if params.placement == "tensor_parallel" else False
    config = read_config(folder).get_text_config(decoder=True)
    return bool(getattr(config, "base_model_tp_plan", None))


def unused(placement: Placement, n_gpus: int) -> str | None:
    """What to warn of where a process has more GPUs than it uses."""
    n = placement.n_devices
    if n_gpus <= n:
        return None
    return (
        f"this process has {n_gpus} GPUs and uses {n} ({placement.reason}): set processes_per_task to {n_gpus // n} "
        "times what it is, or leave it out and give gpu_memory_gib in the cluster's profile, so that it is found"
    )


# ------------------------------------------------------------------------------------------------------------ proof


@torch.inference_mode()
def prove_whole(teacher: Teacher) -> None:
    """Raise TeacherError, on every rank, unless each rank holds the same whole states and logits.

    A plan that leaves a block's output in pieces or as partial sums, or the logits split, is noticed here: the ranks
    would hold different numbers.
    """
    import torch.distributed as dist

    ids_BT = probe_ids(teacher.n_token_ids).to(teacher.device)
    with tapped((teacher.decoder, *teacher.blocks)) as outputs:
        logits_BTV = teacher.model(input_ids=ids_BT, use_cache=False).logits
    states = {f"block {n}": outputs[block][0] for n, block in enumerate(teacher.blocks)}
    states |= {"the final norm": outputs[teacher.decoder][0], "the head": logits_BTV}
    n_columns, n_logits = logits_BTV.shape[-1], teacher.model.get_output_embeddings().weight.shape[0]
    for where, mine in states.items():
        rank_0s = mine.contiguous().clone()
        dist.broadcast(rank_0s, src=0)
        difference = torch.tensor(relative_difference(mine.float(), rank_0s.float()), device=teacher.device)
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        if difference.item() > CAUSAL_RTOL[teacher.dtype] or n_columns != n_logits:
            raise TeacherError(
                f"{type(teacher.model).__name__} by tensor parallelism: its ranks hold different outputs of {where} "
                f"(relative difference {difference.item():.2g}; {n_columns} of {n_logits} logits), so its plan does "
                "not put them together again"
            )
