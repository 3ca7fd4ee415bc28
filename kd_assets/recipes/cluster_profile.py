"""Cluster profiles and resources as YAML has them, and the frozen forms behind them.

Imported by the components (a recipe's `slurm:`) and by the platform (`slurm/profiles/*.yaml`). What it accepts ends on
sbatch's command line, so each word is checked here, once: no word can become an option of its own, and no option can
undo what the scheduler relies on (its job's name, its array, its signal). Each check stands twice, as JSON schema,
which is all that `dg check yaml` looks at, and as a validator with a message for whoever loads the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import dagster as dg
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from kd_assets.contract import JobKind
from kd_assets.dagster_internals import parse_yamls_with_source_position
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.scheduler.job import Resources
from kd_assets.scheduler.shipped import PROFILES_FOLDER
from kd_assets.scheduler.slurm.profile import Profile

Positive = Annotated[int, Field(gt=0)]
VariableName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]

# ------------------------------------------------------------------------------------------------ words for sbatch

_CONTROL = "[\\x00-\\x1f\\x7f]"
_OWN_OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("array", "chdir", "comment", "error", "export", "export-file", "input", "job-name", "no-requeue",
         "open-mode", "output", "parsable", "requeue", "signal", "wrap"),
        "kd_assets sets it itself",
    ),
    "dependency": "kd_assets could not follow such a job",
    **dict.fromkeys(("help", "test-only", "usage", "version", "wait"), "sbatch would not simply submit"),
    "account": "write it as the field account",
    "clusters": "write it as the profile's field clusters",
    "constraint": "write it as the field constraint",
    "cpus-per-task": "write it as the field cpus",
    "exclude": "write it as the field exclude",
    "exclusive": "write it as the field exclusive",
    "gpus-per-node": "write it as the field gpus_per_node",
    "mem": "write it as the field memory_gib",
    "mem-per-cpu": "write it as the field memory_per_cpu_gib",
    "mem-per-gpu": "write it as the field memory_per_gpu_gib",
    "partition": "write it as the field partition",
    "qos": "write it as the field qos",
    "time": "write it as the field time",
}  # fmt: skip
"""Long options that `sbatch_options` may not hold, and why."""
_FLAGS = (
    "contiguous", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "overcommit", "oversubscribe", "propagate",
    "quiet", "reboot", "spread-job", "use-min-nodes", "verbose",
)  # fmt: skip
"""Options that stand alone. Any other one without `=` would take what follows for its value: our script."""


def _prefixes(name: str) -> str:
    """A pattern for `name` and every beginning of it: getopt takes an option by any beginning that is clear."""
    return "".join(f"(?:{re.escape(letter)}" for letter in name) + ")?" * (len(name) - 1) + ")"


# `--gpus` is an option of its own, and getopt prefers it to the beginning of --gpus-per-node.
_OWN = "^--(?!gpus(?:=|$))(?:" + "|".join(_prefixes(name) for name in _OWN_OPTIONS) + ")(?:=|$)"
_OPTION = f"^--(?:[a-z][a-z0-9-]*=.|(?:{'|'.join(_FLAGS)})$)"


def refused(when: Mapping[str, Any], because: str) -> dict[str, Any]:
    """JSON schema that refuses what matches `when` with a reason: validators print the list of an enum."""
    return {"if": dict(when), "then": {"enum": [because]}}


_ONE_LINE = "one line, without control characters"
_NOT_AN_OPTION = "a name: it may not begin with - (sbatch would take it for an option)"
_AN_OPTION = "--name=value, or a flag such as --contiguous"
_NOT_OURS = "an option that kd_assets does not set itself (job name, array, output, signal, …) and that has no field"


def _word(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "it is empty: name something, or leave the field out")
    if re.search(_CONTROL, value):
        raise PydanticCustomError("control", f"expected {_ONE_LINE}")
    if value.startswith("-"):
        raise PydanticCustomError("option", f"expected {_NOT_AN_OPTION}")
    return value


def _option(value: str) -> str:
    if re.search(_CONTROL, value):
        raise PydanticCustomError("control", f"expected {_ONE_LINE}")
    if re.search(_OWN, value):
        given = value[2:].partition("=")[0]
        name = given if given in _OWN_OPTIONS else next(n for n in sorted(_OWN_OPTIONS) if n.startswith(given))
        raise PydanticCustomError("ours", f"--{name} may not stand here: {_OWN_OPTIONS[name]}")
    if not re.search(_OPTION, value):
        raise PydanticCustomError("option", f"expected {_AN_OPTION}")
    return value


def _word_schema(*more: dict[str, Any]) -> dict[str, Any]:
    """What `_word` accepts, as a schema for editors; `more` is refused besides."""
    no_line = refused({"type": "string", "pattern": _CONTROL}, _ONE_LINE)
    no_option = refused({"type": "string", "pattern": "^-"}, _NOT_AN_OPTION)
    return {"type": "string", "pattern": "\\S", "allOf": [no_line, no_option, *more]}


Word = Annotated[
    str,
    AfterValidator(_word),
    WithJsonSchema(_word_schema()),
]
"""What follows `--partition=` and the like."""

_ONE_NODE = "one node: SLURM gives each task all nodes of a list. To keep tasks from some, use exclude or constraint"


def _one_node(value: str) -> str:
    if re.search(r"[,\[]", _word(value)):
        raise PydanticCustomError("nodelist", f"expected {_ONE_NODE}")
    return value


OneNode = Annotated[
    str,
    AfterValidator(_one_node),
    WithJsonSchema(_word_schema(refused({"type": "string", "pattern": "[,\\[]"}, _ONE_NODE))),
]
"""What follows `--nodelist=`."""


def _one_cluster(value: str) -> str:
    if "," in _word(value) or value == "all":
        raise PydanticCustomError("clusters", "expected one cluster: a job is followed on the one that it was sent to")
    return value


SbatchOption = Annotated[
    str,
    AfterValidator(_option),
    WithJsonSchema(
        {
            "type": "string",
            "allOf": [
                refused({"type": "string", "pattern": _CONTROL}, _ONE_LINE),
                refused({"type": "string", "not": {"pattern": _OPTION}}, _AN_OPTION),
                refused({"type": "string", "pattern": _OWN}, _NOT_OURS),
            ],
        }
    ),
]

# ------------------------------------------------------------------------------------------------------------- time

_TIME = r"^(?:[0-9]{1,3}-[0-9]{1,2}|[0-9]{1,4}):[0-5][0-9]:[0-5][0-9]$"
_QUOTE_IT = 'in quotes: "HH:MM:SS" or "D-HH:MM:SS" (a plain number is minutes, below 60)'


def minutes_of(time: int | str) -> int:
    """Whole minutes, rounded up, of `"HH:MM:SS"`, `"D-HH:MM:SS"` or a number of minutes below 60.

    A larger number is refused: YAML reads 1:00:00 without quotes as the number 3600, which as minutes would ask for 60
    hours instead of one. Raises ValueError.
    """
    if isinstance(time, int):
        if not 0 < time < 60:
            raise ValueError(f"expected the time {_QUOTE_IT}: YAML reads 1:00:00 without quotes as the number 3600")
        return time
    if not re.search(_TIME, time) or time.endswith("\n"):
        raise ValueError(f"expected the time {_QUOTE_IT}")
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    total = (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)
    if total == 0:
        raise ValueError("a time limit of 0 would end the job at once (or never, where a site means that by 0)")
    return total


def _time(value: int | str) -> int | str:
    try:
        minutes_of(value)
    except ValueError as e:
        raise PydanticCustomError("time", "{why}", {"why": str(e)}) from e
    return value


TimeLimit = Annotated[
    int | str,
    AfterValidator(_time),
    WithJsonSchema(
        {
            "type": ["string", "integer"],
            "allOf": [
                refused({"type": "integer", "not": {"minimum": 1, "maximum": 59}}, _QUOTE_IT),
                refused({"type": "string", "not": {"pattern": _TIME}}, _QUOTE_IT),
                refused({"type": "string", "pattern": "^[0:-]*$"}, "a time above 0"),
            ],
        }
    ),
]


class ResourcesModel(dg.Model, dg.Resolvable):
    """What each task of a job asks SLURM for. What is left out is the cluster profile's word, then the site's; where
    the profile asks for something, `gpus_per_node: 0`, `exclusive: false` and `sbatch_options: []` ask for none."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU. Nothing is asked for by it: it tells beforehand over how many of them a teacher goes."""
    cpus: Positive | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Of a node. In its place: the memory for each processor or GPU, or `memory: site`, which asks for none."""
    memory_per_cpu_gib: Annotated[float, Field(gt=0)] | None = None
    memory_per_gpu_gib: Annotated[float, Field(gt=0)] | None = None
    memory: Literal["site"] | None = None
    max_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """How far the memory is raised when a task ran out of it, of what it is asked for; without it, to four times it."""
    time: TimeLimit | None = None
    exclusive: bool | None = None
    exclude: Word | None = None
    """Nodes that no task is to run on, besides those that are excluded elsewhere: `n[1-3],n7`."""
    nodelist: OneNode | None = None
    """The node that every task is to run on."""
    sbatch_options: list[SbatchOption] | None = None
    """Further options, each `--name=value`; a list of its own takes the place of the whole list said before it."""

    @field_validator("max_memory_gib")
    @classmethod
    def _not_below_memory(cls, most: float | None, info: ValidationInfo) -> float | None:
        for name in ("memory_gib", "memory_per_cpu_gib", "memory_per_gpu_gib"):
            least = info.data.get(name)
            if most is not None and least is not None and most < least:
                raise PydanticCustomError("memory", f"max_memory_gib ({most:g}) is below {name} ({least:g})")
        return most

    @field_validator("memory_per_cpu_gib", "memory_per_gpu_gib", "memory")
    @classmethod
    def _one_word_for_memory(cls, value: object, info: ValidationInfo) -> object:
        """As SLURM has it: its options for memory exclude each other."""
        names = ("memory_gib", "memory_per_cpu_gib", "memory_per_gpu_gib", "memory")
        others = [name for name in names if name != info.field_name and info.data.get(name) is not None]
        if value is not None and others:
            raise PydanticCustomError("memory", f"{others[0]} says it already: keep one of {', '.join(names)}")
        return value

    def to_resources(self) -> Resources:
        of: dict[Literal["cpu", "gpu"], float | None] = {"cpu": self.memory_per_cpu_gib, "gpu": self.memory_per_gpu_gib}
        memory_of: Literal["cpu", "gpu", "site"] | None = self.memory
        for name, gib in of.items():
            memory_of = name if gib is not None else memory_of
        return Resources(
            slurm_partition=self.partition,
            account=self.account,
            qos=self.qos,
            constraint=self.constraint,
            gpus_per_node=self.gpus_per_node,
            gpu_memory_gib=self.gpu_memory_gib,
            cpus=self.cpus,
            memory_gib=self.memory_gib or self.memory_per_cpu_gib or self.memory_per_gpu_gib,
            memory_of=memory_of,
            max_memory_gib=self.max_memory_gib,
            time_minutes=None if self.time is None else minutes_of(self.time),
            exclusive=self.exclusive,
            exclude=self.exclude,
            nodelist=self.nodelist,
            sbatch_options=None if self.sbatch_options is None else tuple(self.sbatch_options),
        )


# --------------------------------------------------------------------------------------------------------- profiles


class KindsModel(dg.Model):
    """What jobs of a kind ask for, where a recipe does not say."""

    shards: ResourcesModel = ResourcesModel()
    teacher: ResourcesModel = ResourcesModel()
    student: ResourcesModel = ResourcesModel()
    export: ResourcesModel | None = None
    """Left out: as shards, which need no GPU either."""


def _ssh_target(value: str) -> str:
    if not re.fullmatch(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]*", value):
        raise PydanticCustomError("ssh", "expected user@host or a name of your ssh configuration, in one word")
    return value


def _argument(value: str) -> str:
    if not value or re.search(_CONTROL, value):
        raise PydanticCustomError("argument", f"expected {_ONE_LINE}, and not nothing")
    return value


class ProfileModel(ResourcesModel):
    """A cluster as this deployment uses it. The fields of `ResourcesModel` hold for every kind of job."""

    kinds: KindsModel = KindsModel()
    array_concurrency: Positive | None = None
    secrets: list[VariableName] = Field(default_factory=lambda: ["HF_TOKEN"])
    setup: str = ""
    clusters: Annotated[str, AfterValidator(_one_cluster)] | None = None
    """The cluster that jobs are sent to and followed on; left out: SLURM_CLUSTERS, else SLURM's own."""
    ssh: Annotated[str, AfterValidator(_ssh_target)] | None = None
    ssh_options: list[Annotated[str, AfterValidator(_argument)]] = Field(default_factory=list)
    poll_interval_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    command_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    visibility_grace_s: Annotated[float, Field(ge=0)] = 30.0
    absence_grace_s: Annotated[float, Field(ge=0)] = 60.0
    signal_s: Annotated[int, Field(gt=0, le=65535)] = 300

    @field_validator("setup")
    @classmethod
    def _bash_without_secrets(cls, setup: str, info: ValidationInfo) -> str:
        if "\x00" in setup:
            raise PydanticCustomError("nul", "Bash cannot read a NUL character")
        for name in info.data.get("secrets", ()):
            if re.search(rf"(?:^|[\s;&|]){name}=", setup):
                raise PydanticCustomError(
                    "secret", f"it sets {name}, and everyone can read it: set {name} where Dagster runs instead"
                )
        return setup

    def to_profile(self, name: str) -> Profile:
        return Profile(
            name=name,
            clusters=self.clusters,
            ssh=self.ssh,
            ssh_options=tuple(self.ssh_options),
            defaults=self.to_resources(),
            kinds={
                "shards": self.kinds.shards.to_resources(),
                "teacher": self.kinds.teacher.to_resources(),
                "student": self.kinds.student.to_resources(),
                "export": (self.kinds.export or self.kinds.shards).to_resources(),
                "recode": (self.kinds.export or self.kinds.shards).to_resources(),
            },
            array_concurrency=self.array_concurrency,
            setup=self.setup,
            secrets=tuple(dict.fromkeys(self.secrets)),
            poll_interval_s=self.poll_interval_s,
            command_timeout_s=self.command_timeout_s,
            visibility_grace_s=self.visibility_grace_s,
            absence_grace_s=self.absence_grace_s,
            signal_s=self.signal_s,
        )


def find_profile(name_or_path: str, folder: Path = PROFILES_FOLDER) -> Path:
    """The file of a profile: a name of those shipped (`slurm/profiles`), or a path (with a slash or `.yaml`).

    Raises MissingInputError, listing the profiles that there are.
    """
    named = not ("/" in name_or_path or name_or_path.endswith((".yaml", ".yml")))
    path = folder / f"{name_or_path}.yaml" if named else Path(name_or_path).expanduser().absolute()
    if path.is_file():
        return path
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
    raise MissingInputError(
        f"no cluster profile {name_or_path!r}: {path} is not a file. Set KD_SLURM_PROFILE to a path, or to one of "
        f"{folder}: {known}"
    )


def read_profile(path: Path) -> Profile:
    """The profile in a YAML file, named after it.

    Raises MissingInputError when it cannot be read, RecipeError naming file, line and field of all that is wrong.
    """
    try:
        documents = parse_yamls_with_source_position(path.read_text(), filename=str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise MissingInputError(f"the cluster profile {path} cannot be read: {e}") from e
    except Exception as e:  # yaml's own errors, by way of Dagster
        raise RecipeError(f"the cluster profile {path} is not YAML: {' '.join(str(e).split())}") from e
    if len(documents) > 1:
        raise RecipeError(f"the cluster profile {path} holds {len(documents)} documents: take out the lines of ---")
    raw = {} if not documents or documents[0].value is None else documents[0].value
    if not isinstance(raw, dict):
        raise RecipeError(f"the cluster profile {path} is no mapping: write lines of `field: value`")
    try:
        model = ProfileModel.model_validate(raw)
    except ValidationError as e:
        tree = documents[0].source_position_tree
        wrong = [_complaint(path, error, tree.lookup_closest_and_path(error["loc"], None)[0]) for error in e.errors()]
        raise RecipeError("; ".join(dict.fromkeys(wrong))) from e
    profile = model.to_profile(path.stem)
    try:
        for kind in get_args(JobKind):
            profile.resources(kind, Resources())
    except RecipeError as e:
        raise RecipeError(f"{path}: {e}") from e
    return profile


def _complaint(path: Path, error: Any, position: Any) -> str:
    """One line for one error of pydantic's."""
    location: Sequence[str | int] = error["loc"]
    field, message = ".".join(map(str, location)), str(error["msg"])
    if error["type"] == "extra_forbidden":
        known: type = ProfileModel if len(location) == 1 else KindsModel if len(location) == 2 else ResourcesModel
        fields = ", ".join(sorted(known.model_fields))  # type: ignore[attr-defined]
        message = f"there is no such field; there are {fields}"
    return f"{path}:{position.start.line}: {field}: {message}"
