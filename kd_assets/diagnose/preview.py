"""What a materialization would submit now, and nothing submitted: `kd-assets preview`.

It asks the planner for the work and the scheduler for its command lines, the very functions that a run asks, so that
what it prints is what runs. Where a job's key cannot be known yet, since it is made of shards that are not tokenised,
it says so and shows the job with a key of zeros.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd_assets.cards.words import counted
from kd_assets.contract import Asset, JobKind, Output, WorkUnit, read_job
from kd_assets.errors import NO_ANSWER, ContractError, MissingInputError, RecipeError
from kd_assets.model_files.placement import Placement
from kd_assets.orchestration.driving.following import described
from kd_assets.orchestration.materialize import planner_of
from kd_assets.orchestration.planning.planned_exports import export_work
from kd_assets.orchestration.planning.planned_recoding import recode_work
from kd_assets.orchestration.planning.planned_work import PlannedWork, Survey
from kd_assets.orchestration.planning.planner import Planner
from kd_assets.orchestration.planning.task_resources import task_resources
from kd_assets.orchestration.platform import BATCH_SCRIPT, Platform, secrets_set
from kd_assets.recipes.recipe import SHARDS_MANIFEST, STUDENT_SMOKE, Recipe
from kd_assets.scheduler import (
    JobSpec,
    Profile,
    Resources,
    SlurmScheduler,
    Submission,
    spread,
    submission_key,
)
from kd_assets.scheduler.folder import key_folder
from kd_assets.store import Manifest, failed_check, quarantine_in_words
from kd_assets.store.reading.selection import select_partitions

UNKNOWN_KEY = "0" * 32
UNKNOWN_WEIGHTS = "0" * 64
MOST_TASKS_SHOWN = 12
MOST_COMMANDS_SHOWN = 4
MOST_NOTES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPreview:
    partition_keys: tuple[str, ...]
    n_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPreview:
    """One job that would be submitted."""

    spec: JobSpec
    tasks: tuple[TaskPreview, ...]
    commands: tuple[tuple[str, ...], ...]
    """Of sbatch, one for each array. With the local scheduler: what each task would run as."""
    log_files: str
    """A pattern: `NUMBER` counts the submissions of the same work."""
    environment: str | None = None
    """The file that every task sources first; None with the local scheduler, whose tasks inherit the environment."""
    placement: Placement | None = None
    """Of the teacher, where it is settled before a node has a say."""
    placement_words: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_partitions(self) -> int:
        return sum(len(task.partition_keys) for task in self.tasks)

    @property
    def n_tokens(self) -> int:
        return sum(task.n_tokens for task in self.tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """All that a run over a selection would submit."""

    recipe: str
    scheduler: str
    """`local`, or `slurm` with the name of its profile."""
    n_selected: int
    jobs: tuple[JobPreview, ...]
    notes: tuple[str, ...]
    """What is not submitted, and why."""
    secrets: Mapping[str, bool] = field(default_factory=dict)
    """Name → whether it is set here, and so would reach the tasks."""

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        for job, raw in zip(self.jobs, record["jobs"], strict=True):
            raw |= {"kind": job.spec.kind, "n_partitions": job.n_partitions, "n_tokens": job.n_tokens}
            raw["shell"] = [shlex.join(command) for command in job.commands]
        return record


# ------------------------------------------------------------------------------------------------------- selection


def select_assets(recipe: Recipe, names: Sequence[str] | None) -> list[Asset]:
    """The partitioned assets and the student, in the order they are made; None: all that the recipe has.

    Raises RecipeError for a name the recipe does not have.
    """
    known: list[Asset] = [*recipe.partitioned, *([STUDENT_SMOKE] if recipe.student else [])]
    if names is None:
        return known
    wanted = [name.removeprefix(f"{recipe.name}/") for name in names]
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(f"recipe {recipe.name} submits nothing for {unknown[0]!r}; it has {', '.join(known)}")
    return [asset for asset in known if asset in wanted]


# --------------------------------------------------------------------------------------------------------- preview


def preview(recipe: Recipe, platform: Platform, *, partitions: str | None, assets: Sequence[str] | None) -> Preview:
    """What materializing these assets of these partitions would submit now.

    Raises MissingInputError when there is no plan or a file of the teacher is missing, RecipeError for a selection that
    cannot be, SchedulerUnreachableError when the cluster does not answer.
    """
    planner = planner_of(recipe, platform)
    keys = select_partitions(planner.current_plan().keys, partitions)
    profile = platform.profile()
    previewer = _Previewer(recipe, platform, profile, planner)
    selected = select_assets(recipe, assets)
    previewer.look_at(keys, selected)
    return Preview(
        recipe=recipe.name,
        scheduler="local" if profile is None else f"slurm, profile {profile.name}",
        n_selected=len(keys),
        jobs=tuple(previewer.jobs),
        notes=(*previewer.notes, *quarantine_in_words(planner.recipe_folder, selected, set(keys))),
        secrets={} if profile is None else {name: name in secrets_set(profile) for name in profile.secrets},
    )


class _Previewer:
    """Collects the jobs of one selection, in the order a run would come to them."""

    def __init__(self, recipe: Recipe, platform: Platform, profile: Profile | None, planner: Planner) -> None:
        self._recipe, self._platform, self._profile, self._planner = recipe, platform, profile, planner
        self.scheduler = platform.make_scheduler(submits=False, profile=profile)
        self.jobs: list[JobPreview] = []
        self.notes: list[str] = []

    def look_at(self, keys: Sequence[str], assets: Sequence[Asset]) -> None:
        shards = self._planner.shards_work(keys).survey()
        not_tokenised = {unit.partition_key: unit.n_tokens for unit in shards.missing.units}
        if SHARDS_MANIFEST in assets:
            self._add_job(self._not_in_hand(shards))
        caches = [asset for asset in self._recipe.caches if asset in assets]
        if caches:
            self._add_caches(keys, caches, not_tokenised if SHARDS_MANIFEST in assets else {})
        if exports := [asset for asset in self._recipe.export_params if asset in assets]:
            self._add_exports(keys, exports)
        if STUDENT_SMOKE in assets:
            self._add_student()

    def _missing(self, work: PlannedWork) -> PlannedWork:
        """What of `work` is neither committed nor in a live job's hands; the rest becomes notes."""
        for key, why in work.unreachable.items():
            self.notes.append(f"{work.kind}: nobody can tell what {key} needs: {why}")
        failed: list[str] = []

        def note_failed(unit: WorkUnit, output: Output, manifest: Manifest) -> None:
            if why := failed_check(manifest):
                failed.append(
                    f"{work.kind}: {output.asset} of {unit.partition_key} is committed and not made again, and fails "
                    f"the run: {why}"
                )

        missing = self._not_in_hand(work.survey(note_failed))
        self.notes += _shortened(failed, MOST_NOTES)
        return missing

    def _not_in_hand(self, survey: Survey) -> PlannedWork:
        missing, kind = survey.missing, survey.missing.kind
        impossible = [f"{kind}: {key} is impossible: {why}" for key, why in survey.impossible.items()]
        self.notes += _shortened(impossible, MOST_NOTES)
        unreachable = [f"{kind}: nobody can tell whether it is there: {why}" for why in survey.unreachable.values()]
        self.notes += _shortened(unreachable, MOST_NOTES)
        if n_there := len({u.partition_key for u, _ in survey.committed} - {u.partition_key for u in missing.units}):
            self.notes.append(f"{kind}: {counted(n_there, 'partition')} committed already; reused")
        for submission in self.scheduler.live(self._recipe.name, kind) if missing.units else []:
            try:
                units = read_job(submission.job_file).units
            except (ContractError, *NO_ANSWER) as e:
                self.notes.append(f"{kind}: {described(self.scheduler, submission)} cannot be joined: {e}")
                continue
            theirs = {o.path for unit in units for o in unit.outputs}
            rest = missing.only(lambda o, theirs=theirs: o.path not in theirs)  # type: ignore[misc]
            if rest != missing:
                self.notes.append(f"{kind}: {described(self.scheduler, submission)} is at some of it; joined")
            missing = rest
        return missing

    def _add_caches(self, keys: Sequence[str], caches: Sequence[Asset], not_tokenised: Mapping[str, int]) -> None:
        if "topk_cache" in caches:
            self._planner.require_vocabulary()
        tokenised = [key for key in keys if key not in not_tokenised]
        weights = self._planner.known_weights() if tokenised else None
        work = self._planner.teacher_work(tokenised, caches, weights=weights or UNKNOWN_WEIGHTS)
        work = self._recoded_first(self._missing(work))
        notes = []
        if not_tokenised:
            notes.append(
                f"follows the shards job, in the run: {counted(len(not_tokenised), 'partition')} not tokenised yet, "
                "their tokens as the plan estimates them. The zeros stand for the key, which is made of their content"
            )
        if work.units and weights is None:
            notes.append(
                f"the weights in {self._planner.teacher_folder} are not hashed yet, which the run does first; before "
                "that it is not known which caches are committed, so all are shown. The zeros stand for the key"
            )
        if not notes:
            self._add_job(work)
            return
        tokens = {u.partition_key: u.n_tokens for u in work.units} | dict(not_tokenised)
        self._add("teacher", UNKNOWN_KEY, {key: tokens[key] for key in keys if key in tokens}, *notes)

    def _recoded_first(self, work: PlannedWork) -> PlannedWork:
        """Add the job that recodes what can be of what is missing; returns what is left for the teacher."""
        if not self._recipe.recode:
            return work
        recoding = recode_work(work.units, self.notes.append)
        self._add_job(self._missing(recoding))
        recoded = {output.path for unit in recoding.units for output in unit.outputs}
        return work.only(lambda output: output.path not in recoded) if recoded else work

    def _add_exports(self, keys: Sequence[str], exports: Sequence[Asset]) -> None:
        """Of partitions whose caches a job before them makes it is not known yet of what content they are made."""
        if any(job.spec.kind in ("teacher", "recode") for job in self.jobs):
            self.notes.append(f"export: {', '.join(exports)} follow, in the run, of what these jobs make")
        elif self._planner.planned_weights() is None and self._planner.known_weights() is None:
            self.notes.append("export: the teacher's weights are not hashed yet, which the run does first")
        else:
            self._add_job(self._missing(export_work(self._planner, self._recipe, keys, exports)))

    def _add_student(self) -> None:
        if any(job.spec.kind in ("teacher", "recode") for job in self.jobs):
            self.notes.append(f"student: {STUDENT_SMOKE} is trained on what these jobs make, by a run after them")
            return
        try:
            if self._planner.planned_weights() is None and self._planner.known_weights() is None:
                self.notes.append("student: the teacher's weights are not hashed yet, which its run does first")
                return
            work, _ = self._planner.student_work()
        except MissingInputError as e:
            self.notes.append(f"student: {e}")
        else:
            self._add_job(self._missing(work))

    def _add_job(self, work: PlannedWork) -> None:
        if work.units:
            key = submission_key(work.kind, self._recipe.name, work.units)
            self._add(work.kind, key, {u.partition_key: u.n_tokens for u in work.units})

    def _add(self, kind: JobKind, key: str, n_tokens: Mapping[str, int], *notes: str) -> None:
        wanted = self._recipe.tasks_of(kind)
        keys, sizes = list(n_tokens), list(n_tokens.values())
        tasks = tuple(
            TaskPreview(partition_keys=tuple(keys[i] for i in task), n_tokens=sum(sizes[i] for i in task))
            for task in spread(sizes, wanted.n_tasks)
        )
        task = task_resources(self._recipe, self._platform, self._planner, kind, profile=self._profile)
        spec = JobSpec(
            key=key,
            recipe=self._recipe.name,
            kind=kind,
            n_tasks=len(tasks),
            concurrency=wanted.concurrency,
            resources=task.resources,
        )
        folder = key_folder(self._platform.jobs_folder, recipe=spec.recipe, kind=kind, key=key) / "NUMBER"
        environment = None
        if isinstance(self.scheduler, SlurmScheduler):
            environment = self.scheduler.environment_text(spec)
            commands = [tuple(argv) for argv in self.scheduler.preview(spec)]
            logs = next(word.partition("=")[2] for word in commands[0] if word.startswith("--output="))
        else:
            commands = list(local_commands(spec, Submission(folder=folder), self._platform.compute_python))
            logs = str(self.scheduler.log_file(Submission(folder=folder), 0).with_name("task-*.log"))
        self.jobs.append(
            JobPreview(
                spec=spec,
                tasks=tasks,
                commands=tuple(commands),
                log_files=logs,
                environment=environment,
                placement=task.placement,
                placement_words=task.words,
                notes=notes,
            )
        )


def local_commands(spec: JobSpec, submission: Submission, python: str) -> Iterator[tuple[str, ...]]:
    """What each task of a local job runs as."""
    for index in range(spec.n_tasks):
        ranks = f"KD_N_PROCESSES={spec.resources.n_processes}"
        variables = (f"KD_PYTHON={python}", ranks, f"SLURM_ARRAY_TASK_ID={index}", "SLURM_RESTART_COUNT=0")
        yield ("env", *variables, "bash", str(BATCH_SCRIPT), str(submission.job_file))


# ----------------------------------------------------------------------------------------------------------- words


def text_lines(shown: Preview) -> Iterator[str]:
    """For people: one paragraph a job."""
    yield f"recipe {shown.recipe}, {counted(shown.n_selected, 'partition')} selected, scheduler {shown.scheduler}"
    yield from (f"  {note}" for note in shown.notes)
    for job in shown.jobs:
        yield ""
        yield from _job_lines(job)
    if not shown.jobs:
        yield "nothing to submit"
        return
    if shown.secrets:
        names = [f"{name} ({'set' if is_set else 'not set here'})" for name, is_set in shown.secrets.items()]
        yield f"\nsecrets, by a file that only the user can read, and never shown: {', '.join(names)}"
    yield "\nNothing was submitted."


def _job_lines(job: JobPreview) -> Iterator[str]:
    spec, estimated = job.spec, "about " if job.notes or job.spec.kind == "shards" else ""
    yield (
        f"{spec.kind}: {counted(job.n_partitions, 'partition')}, {estimated}{job.n_tokens:,} tokens, "
        f"in {spec.n_tasks} tasks, at most {spec.concurrency} at once"
    )
    yield from (f"  {note}" for note in job.notes)
    yield f"  {'task':>4}  {'partitions':>10}  {'tokens':>13}"
    rows = [
        f"  {index:>4}  {len(task.partition_keys):>10,}  {task.n_tokens:>13,}  {_range(task.partition_keys)}"
        for index, task in enumerate(job.tasks)
    ]
    yield from _shortened(rows, MOST_TASKS_SHOWN)
    yield f"  each task asks for: {resources_in_words(spec.resources)}"
    yield from [f"  {job.placement_words}"] if job.placement_words else []
    yield f"  logs: {job.log_files}"
    if job.environment is not None:
        yield "  environment.sh, which each task sources first:"
        yield from (f"    {line}" for line in job.environment.splitlines())
    yield from _shortened([f"  {shlex.join(command)}" for command in job.commands], MOST_COMMANDS_SHOWN)


def resources_in_words(resources: Resources) -> str:
    said: list[str] = []
    for name, label in (
        ("slurm_partition", "partition"), ("account", "account"), ("qos", "qos"), ("constraint", "constraint"),
        ("nodelist", "node"), ("exclude", "not on"),
    ):  # fmt: skip
        if (value := getattr(resources, name)) is not None:
            said.append(f"{label} {value}")
    memory = "GiB of memory" + (f" per {resources.memory_of.upper()}" if resources.memory_of in ("cpu", "gpu") else "")
    for name, unit in (("gpus_per_node", "GPUs"), ("cpus", "CPUs"), ("memory_gib", memory)):
        if (value := getattr(resources, name)) is not None:
            said.append(f"{value:g} {unit}" if value else f"no {unit}")
    if resources.memory_of == "site":
        said.append("memory as the site gives it")
    elif resources.max_memory_gib is not None:
        said.append(f"at most {resources.max_memory_gib:g} GiB after running out of it")
    if (minutes := resources.time_minutes) is not None:
        said.append(f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h")
    if resources.n_processes > 1:
        said.append(f"{resources.n_processes} processes")
    said += ["the whole node"] if resources.exclusive else []
    return ", ".join([*said, *(resources.sbatch_options or ())]) or "what the site gives by default"


def _range(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]}, …, {keys[-1]}" if len(keys) > 2 else ", ".join(keys)


def _shortened(lines: list[str], most: int) -> list[str]:
    """The lines, or the first ones and the last around how many there are between."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"  … {len(lines) - most:,} more", lines[-1]]
