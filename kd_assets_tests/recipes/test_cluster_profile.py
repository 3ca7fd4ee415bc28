"""Cluster profiles as YAML: what they mean, and how they say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from kd_assets.contract import JobKind
from kd_assets.errors import MissingInputError, RecipeError
from kd_assets.recipes.cluster_profile import ResourcesModel, find_profile, minutes_of, read_profile
from kd_assets.scheduler import Profile, Resources
from kd_assets.scheduler.shipped import PROFILES_FOLDER

NO_WORD: dict[JobKind, Resources] = {kind: Resources() for kind in get_args(JobKind)}


def profile_of(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return read_profile(path)


def complaint_about(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as raised:
        profile_of(tmp_path, text)
    return str(raised.value)


def test_the_default_profile_asks_for_nothing_and_fits_any_cluster() -> None:
    assert read_profile(PROFILES_FOLDER / "default.yaml") == Profile(name="default", kinds=NO_WORD)


def test_every_field_of_the_default_profile_is_explained_and_right_when_it_is_uncommented(tmp_path: Path) -> None:
    lines = (PROFILES_FOLDER / "default.yaml").read_text().splitlines()
    fields = [line.removeprefix("# ") for line in lines if not line.startswith("# ----")]
    start = next(i for i, line in enumerate(fields) if line.startswith("account:"))
    text = "\n".join(line for line in fields[start:] if ":" in line.split("#")[0] or line.startswith("  "))
    profile = profile_of(tmp_path, text)
    assert profile.defaults == Resources(
        slurm_partition="compute",
        account="my_project",
        qos="normal",
        constraint="h100&nvlink",
        gpus_per_node=1,
        gpu_memory_gib=80,
        cpus=8,
        memory_gib=64,
        max_memory_gib=256,
        time_minutes=24 * 60,
        exclusive=True,
        exclude="n[01-03],n07",
        nodelist="n09",
        sbatch_options=("--reservation=maintenance", "--mail-type=FAIL"),
    )
    assert profile.kinds["shards"] == Resources(slurm_partition="cpu", cpus=8, memory_gib=32, time_minutes=120)
    assert profile.setup.splitlines() == ["module load cuda/12.8", "export HF_HOME=/shared/huggingface"]
    assert profile.clusters == "c1"
    assert (profile.ssh, profile.ssh_options) == ("user@login.example.org", ("-p", "2222"))
    assert (profile.array_concurrency, profile.secrets) == (8, ("HF_TOKEN",))
    shown = ("poll_interval_s", "command_timeout_s", "visibility_grace_s", "absence_grace_s", "signal_s")
    defaults = Profile(name="site")
    assert [getattr(profile, name) for name in shown] == [getattr(defaults, name) for name in shown]


def test_the_example_profile_sends_tokenising_to_cpu_nodes_and_leaves_the_teacher_to_its_recipe() -> None:
    profile = read_profile(PROFILES_FOLDER / "h100.yaml")
    assert profile.kinds["shards"].slurm_partition == "cpu"
    assert profile.kinds["teacher"] == Resources()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("partition: -h100", "partition: expected a name: it may not begin with -"),
        ('partition: ""', "partition: it is empty"),
        ('account: "a\\nb"', "account: expected one line"),
        ('qos: "a\\0"', "qos: expected one line"),
        ("account: 12", "account: Input should be a valid string"),
        ("gpus_per_node: -1", "gpus_per_node: Input should be greater than or equal to 0"),
        ("exclusive: maybe", "exclusive: Input should be a valid boolean"),
        ("cpus: 1.5", "cpus: Input should be a valid integer"),
        ("time: 1:00:00", "YAML reads 1:00:00 without quotes as the number 3600"),
        ("time: 1 day", 'time: expected the time in quotes: "HH:MM:SS" or "D-HH:MM:SS"'),
        ('time: "00:00:00"', "a time limit of 0"),
        ("partitin: x", "partitin: there is no such field; there are absence_grace_s, account, array_concurrency,"),
        ("kinds: {teachers: {}}", "kinds.teachers: there is no such field; there are export, shards, student, teacher"),
        ("kinds: {teacher: {gpus: 4}}", "kinds.teacher.gpus: there is no such field; there are account, constraint"),
        ("poll_interval_s: 0", "poll_interval_s: Input should be greater than 0"),
        ("secrets: [HF TOKEN]", "secrets.0: String should match pattern"),
        ("setup: export HF_TOKEN=hf_abc", "setup: it sets HF_TOKEN, and everyone can read it"),
        ("ssh: -oProxyCommand=x", "ssh: expected user@host"),
        ("ssh: a b", "ssh: expected user@host"),
        ("sbatch_options: [--array=3]", "sbatch_options.0: --array may not stand here: kd_assets sets it itself"),
        ("sbatch_options: [--arr=3]", "sbatch_options.0: --array may not stand here"),
        ("sbatch_options: [--part=x]", "--partition may not stand here: write it as the field partition"),
        ("sbatch_options: [--dependency=afterok:1]", "--dependency may not stand here: kd_assets could not follow"),
        ("sbatch_options: [--wait]", "--wait may not stand here: sbatch would not simply submit"),
        ("sbatch_options: [--exclude=n1]", "--exclude may not stand here: write it as the field exclude"),
        (
            "sbatch_options: [--mem-per-gpu=4G]",
            "--mem-per-gpu may not stand here: write it as the field memory_per_gpu",
        ),
        ("sbatch_options: [--clusters=a]", "--clusters may not stand here: write it as the profile's field clusters"),
        ("nodelist: n1,n2", "nodelist: expected one node: SLURM gives each task all nodes of a list"),
        ('nodelist: "n[1-2]"', "nodelist: expected one node"),
        ("exclude: -n1", "exclude: expected a name"),
        ("clusters: a,b", "clusters: expected one cluster"),
        ("memory: none", "memory: Input should be 'site'"),
        ("{memory_gib: 4, memory_per_gpu_gib: 2}", "memory_per_gpu_gib: memory_gib says it already: keep one of"),
        ("{memory_gib: 4, memory: site}", "memory: memory_gib says it already"),
        ("sbatch_options: [--reservation]", "sbatch_options.0: expected --name=value"),
        ("sbatch_options: [-N2]", "sbatch_options.0: expected --name=value"),
        ("sbatch_options: [job.sh]", "sbatch_options.0: expected --name=value"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    complaint = complaint_about(tmp_path, f"# a site\n\n{line}\n")
    assert complaint.startswith(f"{tmp_path}/site.yaml:3: ")
    assert said in complaint


@pytest.mark.parametrize(
    "text",
    [
        "time: 4\n",
        "time: 5\n",
        "time: 6\n",
        "kinds: {teacher: {time: 6}}\n",
        'signal_s: 3600\ntime: "01:00:00"\n',
    ],
)
def test_a_time_limit_that_ends_before_or_with_the_warning_is_refused(tmp_path: Path, text: str) -> None:
    complaint = complaint_about(tmp_path, text)
    assert complaint.startswith(f"{tmp_path}/site.yaml: ")
    assert "minutes leaves no time to work: a task is told to stop" in complaint


def test_a_recipes_time_limit_is_measured_by_the_profiles_warning(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, "signal_s: 300\n")
    with pytest.raises(
        RecipeError, match=r"teacher jobs: a `time` of 4 minutes .* 300 s before .* Give it 7 minutes or"
    ):
        profile.resources("teacher", Resources(time_minutes=4))
    assert profile.resources("teacher", Resources(time_minutes=7)).time_minutes == 7


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    complaint = complaint_about(tmp_path, "cpus: 0\nfoo: 1\n")
    assert "site.yaml:1: cpus" in complaint
    assert "site.yaml:2: foo" in complaint


@pytest.mark.parametrize(
    "option",
    ["--reservation=maintenance", "--gpus=3", "--gres=gpu:a100:4", "--contiguous", "--mail-type=END", "--nodelist=n1"],
)
def test_options_that_kd_assets_leaves_alone_are_taken(option: str) -> None:
    assert ResourcesModel(sbatch_options=[option]).to_resources().sbatch_options == (option,)


@pytest.mark.parametrize("text", ["a: [", "- a", "just words", "a: 1\n---\nb: 2", "\tx"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "site.yaml") in complaint_about(tmp_path, text)


SITE = """
constraint: h100
gpus_per_node: 4
exclusive: true
sbatch_options: [--reservation=maintenance]
kinds:
  shards: {gpus_per_node: 0, exclusive: false, sbatch_options: []}
  student: {gpus_per_node: 1}
"""


@pytest.mark.parametrize(
    ("kind", "recipe", "gpus_per_node", "exclusive", "sbatch_options"),
    [
        ("teacher", {}, 4, True, ("--reservation=maintenance",)),
        ("teacher", {"exclusive": False}, 4, False, ("--reservation=maintenance",)),
        ("teacher", {"gpus_per_node": 0, "sbatch_options": []}, 0, True, ()),
        ("shards", {}, 0, False, ()),
        ("shards", {"gpus_per_node": 2, "exclusive": True, "sbatch_options": ["--nice=5"]}, 2, True, ("--nice=5",)),
        ("student", {}, 1, True, ("--reservation=maintenance",)),
        ("student", {"gpus_per_node": 0}, 0, True, ("--reservation=maintenance",)),
    ],
)
def test_what_is_refused_is_refused_and_what_is_not_said_is_what_was_said_before(
    tmp_path: Path,
    kind: JobKind,
    recipe: dict[str, object],
    gpus_per_node: int,
    exclusive: bool,
    sbatch_options: tuple[str, ...],
) -> None:
    wanted = ResourcesModel.model_validate(recipe).to_resources()
    assert profile_of(tmp_path, SITE).resources(kind, wanted) == Resources(
        constraint="h100", gpus_per_node=gpus_per_node, exclusive=exclusive, sbatch_options=sbatch_options
    )


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    assert profile_of(tmp_path, "# nothing\n") == Profile(name="site", kinds=NO_WORD)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("48:00:00", 2880), ("2-00:00:00", 2880), ("00:00:30", 1), ("01:30:01", 91), ("1-02:03:00", 1563), (30, 30)],
)
def test_a_time_is_whole_minutes_rounded_up(time: int | str, minutes: int) -> None:
    assert minutes_of(time) == minutes


@pytest.mark.parametrize(
    ("recipe", "memory_gib", "memory_of", "max_memory_gib"),
    [
        ({}, 4, "cpu", 8),
        ({"memory_gib": 64}, 64, None, None),
        ({"memory_per_gpu_gib": 80}, 80, "gpu", None),
        ({"memory_per_cpu_gib": 5}, 5, "cpu", 8),
        ({"memory": "site"}, None, "site", None),
        ({"max_memory_gib": 6}, 4, "cpu", 6),
    ],
)
def test_a_word_about_memory_takes_the_place_of_what_was_said_before(
    tmp_path: Path, recipe: dict[str, object], memory_gib: float | None, memory_of: str | None, max_memory_gib: float
) -> None:
    profile = profile_of(tmp_path, "memory_per_cpu_gib: 4\nmax_memory_gib: 8\n")
    asked = profile.resources("teacher", ResourcesModel.model_validate(recipe).to_resources())
    assert (asked.memory_gib, asked.memory_of, asked.max_memory_gib) == (memory_gib, memory_of, max_memory_gib)


def test_exports_ask_for_what_shards_do_unless_the_profile_says_otherwise(tmp_path: Path) -> None:
    text = "gpus_per_node: 4\nkinds:\n  shards: {gpus_per_node: 0, partition: cpu}\n"
    asked = profile_of(tmp_path, text).resources("export", Resources())
    assert (asked.gpus_per_node, asked.slurm_partition) == (0, "cpu")
    own = profile_of(tmp_path, text + "  export: {partition: io}\n").resources("export", Resources())
    assert (own.gpus_per_node, own.slurm_partition) == (4, "io")


def test_what_profile_kind_and_recipe_exclude_adds_up(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, 'exclude: "n[1-2]"\nkinds: {teacher: {exclude: n5}}\n')
    wanted = ResourcesModel.model_validate({"exclude": "n7", "nodelist": "n9"}).to_resources()
    asked = profile.resources("teacher", wanted)
    assert (asked.exclude, asked.nodelist) == ("n[1-2],n5,n7", "n9")
    assert profile.resources("shards", ResourcesModel().to_resources()).exclude == "n[1-2]"


def test_the_memory_limit_is_not_below_the_memory() -> None:
    with pytest.raises(ValueError, match=r"max_memory_gib \(8\) is below memory_gib \(16\)"):
        ResourcesModel(memory_gib=16, max_memory_gib=8)


def test_a_profile_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").touch()
    assert find_profile("site", tmp_path) == tmp_path / "site.yaml"
    assert find_profile(str(tmp_path / "site.yaml")) == tmp_path / "site.yaml"
    assert find_profile("default") == PROFILES_FOLDER / "default.yaml"


def test_a_profile_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no cluster profile 'h1000'.*default, h100"):
        find_profile("h1000")
    with pytest.raises(MissingInputError, match="is not a file"):
        find_profile(f"{tmp_path}/x.yaml")
