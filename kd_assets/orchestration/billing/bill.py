"""The bill of a plan: what its caches take and what they cost, from facts where there are some.

The invariant: each figure says what it rests on, and what is not known is None with its reason, so that a bill is made
of whatever is known. Used by `kd-assets plan` and by the materialization of a shard plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_assets.contract import Asset, JobKind
from kd_assets.errors import InputError, KdAssetsError, StoreError
from kd_assets.model_files.size import TeacherShape, teacher_shape
from kd_assets.orchestration.billing.measured import Committed, Speed, committed_results, speed_of
from kd_assets.orchestration.billing.space import Amount, bytes_at_most, free_bytes, in_windows, tokens_kept
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.platform import Platform
from kd_assets.recipes.recipe import Recipe
from kd_assets.sources.planning.plan import ShardPlan
from kd_assets.sources.planning.token_rate import ASSUMED_BYTES_PER_TOKEN
from kd_assets.store import Manifest, quarantine_in_words
from kd_assets.store.codecs.sizes import decoded_per_byte
from kd_assets.store.codecs.state_codec import require_groups
from kd_assets.store.params_in_identity import params_in_identity

UTILISATION = 0.4
STATED_GPU = "H100"
TFLOPS = {"bfloat16": 989.0, "float16": 989.0, "float32": 67.0}
"""Of one H100 SXM, dense (NVIDIA's data sheet)."""
STATED_WATTS = 700.0
"""Of the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLine:
    name: str
    path: str
    n_documents: int
    n_tokens: int
    """About so many."""
    bytes_per_token: float
    is_measured: bool
    """Whether that was measured on the source's first records, or is assumed."""
    licence: str
    revision: str | None
    n_duplicates: int
    n_left: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLine:
    asset: Asset
    n_tokens: int
    """Of documents cut at what it keeps."""
    n_bytes: int | None
    rests_on: str
    n_there: int
    """Partitions that are committed already."""
    bytes_there: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLine:
    """One pass of the teacher over everything."""

    n_tokens: int
    flops: float | None
    flops_rest_on: str
    device_hours: float | None
    device: str
    hours_rest_on: str
    joules: float | None
    joules_rest_on: str
    n_devices: int
    """That one teacher is spread over, as far as is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksLine:
    kind: JobKind
    n_tasks: int
    concurrency: int
    task_hours: float | None
    limit_hours: float | None
    warning: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    recipe: str
    n_shards: int
    n_documents: int
    n_tokens: int
    sources: tuple[SourceLine, ...]
    caches: tuple[CacheLine, ...]
    teacher: TeacherLine
    tasks: tuple[TasksLine, ...]
    folder: str
    free_bytes: int | None
    said: tuple[str, ...] = ()
    when_space_is_short: str = "refuse"

    @property
    def bytes_left(self) -> int:
        """What is still to be written, as far as is known."""
        return sum(max((line.n_bytes or 0) - line.bytes_there, 0) for line in self.caches)

    @property
    def bytes_missing(self) -> int:
        """What does not fit on the disk; 0 where all fits, or the free space is not known."""
        return 0 if self.free_bytes is None else max(self.bytes_left - self.free_bytes, 0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bytes_left": self.bytes_left, "bytes_missing": self.bytes_missing}


def make_bill(recipe: Recipe, platform: Platform, planner: Planner, plan: ShardPlan) -> Bill:
    """The bill of `plan`, which need not be the current one.

    Raises StorageUnreachableError where the results that are there cannot be looked at, RecipeError as
    `require_states_fit_their_codec` does.
    """
    require_states_fit_their_codec(recipe, planner)
    sources = source_lines(plan)
    amounts = [in_windows(recipe, Amount(n_documents=s.n_documents, n_tokens=s.n_tokens)) for s in sources]
    shape = _shape(recipe, planner)
    there: dict[Asset, Committed] = {}
    newest: dict[Asset, Manifest | None] = {}
    for asset in recipe.partitioned:  # caches before the exports of them
        there[asset], newest[asset] = committed_results(
            recipe, planner.recipe_folder, asset, plan.keys, caches=dict(there)
        )
    caches = cache_lines(recipe, amounts, shape, there)
    hidden_size = None if isinstance(shape, str) else shape.hidden_size
    caches += export_lines(recipe, caches, there, plan.n_shards, hidden_size)
    speed = speed_of(recipe, newest)
    teacher = teacher_line(recipe, amounts, shape, speed)
    try:
        free = free_bytes(planner.recipe_folder)
    except (OSError, StopIteration):
        free = None
    return Bill(
        recipe=recipe.name,
        n_shards=plan.n_shards,
        n_documents=plan.totals["n_documents"],
        n_tokens=sum(s.n_tokens for s in sources),
        sources=sources,
        caches=caches,
        teacher=teacher,
        tasks=tasks_lines(recipe, platform, plan.n_shards, teacher),
        folder=str(planner.recipe_folder),
        free_bytes=free,
        said=(*plan.said, *quarantine_in_words(planner.recipe_folder, recipe.partitioned, set(plan.keys))),
        when_space_is_short=recipe.when_space_is_short,
    )


def require_states_fit_their_codec(recipe: Recipe, planner: Planner) -> None:
    """Raise RecipeError where the codec's groups do not divide the teacher's states, as far as their size is known."""
    shape = _shape(recipe, planner) if recipe.hidden_states is not None else ""
    if recipe.hidden_states is not None and not isinstance(shape, str):
        require_groups(recipe.hidden_states.codec, shape.hidden_size)


def source_lines(plan: ShardPlan) -> tuple[SourceLine, ...]:
    counts = {c.source: c for c in plan.counts}
    lines = []
    for source in plan.sources:
        count, rate = counts.get(source.name), source.bytes_per_token or ASSUMED_BYTES_PER_TOKEN
        lines.append(
            SourceLine(
                name=source.name,
                path=source.path,
                n_documents=source.n_records if count is None else count.n_documents,
                n_tokens=(0 if count is None else count.n_tokens) or round(source.n_bytes / rate),
                bytes_per_token=rate,
                is_measured=source.bytes_per_token is not None,
                licence=source.licence,
                revision=source.revision,
                n_duplicates=0 if count is None else count.n_duplicates,
                n_left=0 if count is None else count.n_left,
            )
        )
    return tuple(lines)


def cache_lines(
    recipe: Recipe,
    amounts: Sequence[Amount],
    shape: TeacherShape | str,
    there: Mapping[Asset, Committed],
) -> tuple[CacheLine, ...]:
    at_most = bytes_at_most(recipe, amounts, None if isinstance(shape, str) else shape.hidden_size)
    lines = []
    for asset, bound in at_most.items():
        n_tokens, committed = tokens_kept(recipe, asset, amounts), there[asset]
        n_bytes, rests_on = bound, "at most, before compression"
        if committed.bytes_per_token is not None:
            n_bytes = round(n_tokens * committed.bytes_per_token)
            rests_on = f"as the results that are there: {committed.bytes_per_token:,.1f} bytes a token"
        elif bound is None:
            rests_on = f"not known: {shape}"
        lines.append(
            CacheLine(
                asset=asset,
                n_tokens=n_tokens,
                n_bytes=n_bytes,
                rests_on=rests_on,
                n_there=committed.n_there,
                bytes_there=committed.n_bytes,
            )
        )
    return tuple(lines)


def export_lines(
    recipe: Recipe,
    caches: Sequence[CacheLine],
    there: Mapping[Asset, Committed],
    n_shards: int,
    hidden_size: int | None,
) -> tuple[CacheLine, ...]:
    """What the recipe's exports take: as those that are there, else about as much as their caches, decoded."""
    lines = []
    for asset in recipe.export_params:
        made_of = [line for line in caches if line.asset in recipe.caches_of([asset])]
        committed = there[asset]
        sizes = [
            line.n_bytes * _decoded_per_byte(recipe, line.asset, there[line.asset], hidden_size)
            for line in made_of
            if line.n_bytes is not None
        ]
        n_bytes, rests_on = None, "not known, as the size of its caches is not"
        if committed.n_there:
            n_bytes = round(committed.n_bytes / committed.n_there * n_shards)
            rests_on = f"as the results that are there: {committed.n_bytes / committed.n_there:,.0f} bytes a partition"
        elif len(sizes) == len(made_of):
            n_bytes, rests_on = round(sum(sizes)), "about as its caches, decoded"
        lines.append(
            CacheLine(
                asset=asset,
                n_tokens=min(line.n_tokens for line in made_of),
                n_bytes=n_bytes,
                rests_on=rests_on,
                n_there=committed.n_there,
                bytes_there=committed.n_bytes,
            )
        )
    return tuple(lines)


def _decoded_per_byte(recipe: Recipe, cache: Asset, committed: Committed, hidden_size: int | None) -> float:
    params = params_in_identity(recipe.cache_params[cache], seed=recipe.teacher.seed)
    if params.get("codec") == "split" and committed.bytes_per_token is None:
        return 1.0  # what is at most is of raw states
    return decoded_per_byte(cache, params, hidden_size)


def teacher_line(
    recipe: Recipe, amounts: Sequence[Amount], shape: TeacherShape | str, speed: Speed | None
) -> TeacherLine:
    """Hours from the speed that was measured last, else from FLOPs at a stated utilisation of a stated GPU."""
    n_tokens = max(tokens_kept(recipe, asset, amounts) for asset in recipe.caches)
    flops, flops_rest_on = None, f"not known: {shape}"
    if not isinstance(shape, str):
        n_blocks, words = _blocks_run(recipe, shape)
        flops = n_tokens * shape.flops_a_token(n_blocks=n_blocks, with_head=recipe.topk is not None)
        flops_rest_on = f"{words}, two a parameter and token, of {shape.parameters / 1e9:,.3g} billion parameters"
    hours, device, rests_on = None, f"{STATED_GPU} GPU", f"not known: {shape}"
    if speed is not None:
        hours, device = n_tokens / speed.tokens_per_s * speed.n_devices / 3600, _device_words(speed)
        rests_on = f"measured on {speed.partition_key}: {speed.tokens_per_s:,.0f} tokens/s"
        rests_on += f" over {speed.n_devices} devices" if speed.n_devices > 1 else ""
    elif flops is not None:
        peak = TFLOPS[recipe.teacher.dtype]
        hours = flops / (peak * 1e12 * UTILISATION) / 3600
        rests_on = f"at {UTILISATION:.0%} of an {STATED_GPU}'s {peak:,.0f} TFLOP/s in {recipe.teacher.dtype}"
    joules, joules_rest_on = None, "not known: nothing was measured"
    if speed is not None and speed.joules_per_token is not None:
        joules, joules_rest_on = n_tokens * speed.joules_per_token, f"measured on {speed.partition_key}"
    elif hours is not None and (speed is None or speed.device != "cpu"):
        joules, joules_rest_on = hours * 3600 * STATED_WATTS, f"at {STATED_WATTS:.0f} W a GPU"
    return TeacherLine(
        n_tokens=n_tokens,
        flops=flops,
        flops_rest_on=flops_rest_on,
        device_hours=hours,
        device=device,
        hours_rest_on=rests_on,
        joules=joules,
        joules_rest_on=joules_rest_on,
        n_devices=recipe.teacher.n_devices or (1 if speed is None else speed.n_devices),
    )


def tasks_lines(recipe: Recipe, platform: Platform, n_shards: int, teacher: TeacherLine) -> tuple[TasksLine, ...]:
    """How a run over the whole plan is split, and whether the teacher's share of a task fits its time."""
    lines = []
    kinds: tuple[JobKind, ...] = ("shards", "teacher", "export") if recipe.exports else ("shards", "teacher")
    for kind in kinds:
        wanted = recipe.tasks_of(kind)
        n_tasks = min(wanted.n_tasks, n_shards)
        try:
            resources = platform.resources(recipe, kind)
        except (KdAssetsError, OSError):  # a profile that cannot be read is for the doctor to say
            resources = wanted.resources
        limit = None if resources.time_minutes is None else resources.time_minutes / 60
        hours, warning = None, ""
        if kind == "teacher" and teacher.device_hours is not None:
            n_devices = max(resources.gpus_per_node or 0, teacher.n_devices, 1)
            hours = teacher.device_hours / (n_tasks * n_devices)
            if limit is not None and hours > limit:
                enough = math.ceil(teacher.device_hours / (n_devices * limit))
                warning = (
                    f"a task's share takes about {hours:,.1f} hours and its time is {limit:,.1f}: it goes on where it "
                    f"was, {math.ceil(hours / limit) - 1:,} times requeued; {enough:,} tasks (jobs.teacher.n_tasks, "
                    "of which concurrency run at once) have time enough"
                )
        lines.append(
            TasksLine(
                kind=kind,
                n_tasks=n_tasks,
                concurrency=min(wanted.concurrency, n_tasks),
                task_hours=hours,
                limit_hours=limit,
                warning=warning,
            )
        )
    return tuple(lines)


def _blocks_run(recipe: Recipe, shape: TeacherShape) -> tuple[int, str]:
    """The pass ends after the last block that a cache needs."""
    hidden = recipe.hidden_states
    if recipe.topk is None and recipe.embeddings is None and hidden is not None and not hidden.final:
        n = min(max(hidden.blocks) + 1, shape.n_blocks)
        return n, f"the first {n} of {shape.n_blocks} blocks, without the head"
    return shape.n_blocks, f"all {shape.n_blocks} blocks{'' if recipe.topk is not None else ', without the head'}"


def _device_words(speed: Speed) -> str:
    return "CPU" if speed.device == "cpu" else speed.device


def _shape(recipe: Recipe, planner: Planner) -> TeacherShape | str:
    """How large the teacher is: by its files, else by the recipe; why it is not known where neither says."""
    try:
        return teacher_shape(planner.teacher_folder)
    except (InputError, StoreError, OSError) as e:
        if recipe.teacher.size is not None:
            return recipe.teacher.size
        why = str(e).split("; ")[0]
        return f"{why}; say how large it is with teacher.size of the recipe"
