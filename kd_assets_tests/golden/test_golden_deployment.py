"""What was committed before is reused by its recipe, and the same recipe asks for the same results today.

The other half of `test_golden_store`: the golden store in a deployment at another path than it was made in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
import torch

from kd_assets.contract import CACHES, EmbeddingParams, HiddenStateParams, StudentParams, TopkParams
from kd_assets.orchestration.materialize import planner_of
from kd_assets.sources.planning.plan import read_plan
from kd_assets.store import committed, computing_versions, read_manifest, verify
from kd_assets.student.dataset import TeacherCacheDataset
from kd_assets_tests.golden.deployment import GoldenDeployment, write_project
from kd_assets_tests.golden.facts import FOLDER, KEPT, RECIPE, expected, results_of
from kd_assets_tests.orchestration.deployment import failure_text, is_reused

SHARDS = ("golden-00000", "golden-00001", "golden-00002")
ALL = (SHARDS[0], SHARDS[-1])
DATA_VERSION = "dagster/data_version"

# What another processor's sums may move: nothing of what is counted or chosen, the last bits of what is computed, and
# where it is stored in fewer bits the last of these.
LAST_BITS = {
    "logsumexp": (1e-5, 1e-5),
    "target_logprob": (1e-5, 1e-5),
    "mean_embedding": (1e-5, 1e-5),
    "last_token_embedding": (1e-5, 1e-5),
    "topk_logprobs": (2**-10, 1e-5),  # float16
    "hidden_block_0": (2**-7, 1e-5),  # bfloat16
    "hidden_block_1": (2**-7, 1e-5),
}
"""Field of a sample → relative and absolute tolerance. Every other field is equal."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder: Path = tmp_path_factory.mktemp("project")
    write_project(folder, FOLDER / "defs.yaml")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def deploy(home: Path, project: Path, *, kept: tuple[str, ...]) -> Iterator[GoldenDeployment]:
    """A deployment in `home` with these of the golden files, and a Dagster instance that knows nothing yet."""
    home.mkdir()
    for name in kept:
        if (FOLDER / name).is_dir():
            shutil.copytree(FOLDER / name, home / name, copy_function=shutil.copyfile)
    instance_folder = home.with_name("instance")
    instance_folder.mkdir()
    with dg.DagsterInstance.local_temp(str(instance_folder)) as instance:
        yield GoldenDeployment(home, project, instance)


@pytest.fixture
def golden(tmp_path: Path, project: Path) -> Iterator[GoldenDeployment]:
    """Today's code over everything that was committed."""
    yield from deploy(tmp_path / "home with a space", project, kept=KEPT)


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Iterator[GoldenDeployment]:
    """Everything made by today's code, from the same sources and the same teacher, in an empty store."""
    home = tmp_path_factory.mktemp("anew") / "home with a space"
    for deployment in deploy(home, project, kept=("teacher", "sources")):
        deployment.say_what_went_without_saying()
        deployment.plan()
        result = deployment.run(*deployment.everything, partition_range=ALL)
        assert result.success, failure_text(result)
        yield deployment


def test_the_golden_recipe_loads_from_its_yaml_as_what_it_was(golden: GoldenDeployment) -> None:
    recipe = golden.recipe
    assert (recipe.name, recipe.sharding.documents_per_shard, recipe.part_documents) == (RECIPE, 4, 3)
    assert recipe.topk == TopkParams(k=4, max_length=24, draws=6)
    assert recipe.hidden_states == HiddenStateParams(blocks=(0, 1), max_length=6)
    assert recipe.embeddings == EmbeddingParams(max_length=32)
    assert recipe.student == StudentParams(
        steps=20, batch_documents=4, max_length=24, hidden_size=32, n_layers=1, temperature=1.0
    )
    assert [(s.spec.name, s.spec.path, s.spec.file_format) for s in recipe.sources] == [
        ("texts", "$KD_HOME/sources/texts.jsonl", "auto"),
        ("chats", "$KD_HOME/sources/chats.jsonl", "auto"),
        ("table", "sources/table.parquet", "parquet"),
    ]
    keys = golden.definitions.resolve_asset_graph().get_all_asset_keys()
    of_then = {f"golden/{asset}" for asset in expected()["code_versions"]}
    assert {key.to_user_string() for key in keys} == {*of_then, "golden/cache_card"}


def test_the_code_versions_are_those_of_then_so_that_nothing_becomes_stale(golden: GoldenDeployment) -> None:
    graph = golden.definitions.resolve_asset_graph()
    found = {asset: graph.get(golden.recipe.key(asset)).code_version for asset in golden.everything}
    assert found == expected()["code_versions"]


def test_planning_again_gives_the_plan_of_then_but_for_the_paths(golden: GoldenDeployment) -> None:
    plan_file = golden.recipe_folder / "shard_plan" / "plan.json"
    of_then = read_plan(plan_file)
    result = golden.run("shard_plan")
    assert result.success, failure_text(result)
    plan = read_plan(plan_file)
    assert plan is not None
    assert of_then is not None
    assert plan.plan_hash == of_then.plan_hash == expected()["plan_hash"]
    assert {s.partition_key: s.input_hash for s in plan} == expected()["input_hashes"]
    places = [[(r.source, r.first_record, r.n_records, r.byte_offset, r.first_line) for r in s.records] for s in plan]
    assert places == [
        [(r.source, r.first_record, r.n_records, r.byte_offset, r.first_line) for r in s.records] for s in of_then
    ]
    assert all(source.path.startswith(str(golden.home)) for source in plan.sources)
    assert tuple(golden.instance.get_dynamic_partitions("golden_shards")) == SHARDS
    assert data_versions(golden, result) == {("shard_plan", None): plan.plan_hash}


@pytest.mark.parametrize("plans_again", [True, False])
def test_everything_that_was_committed_is_reused_and_no_job_is_submitted(
    golden: GoldenDeployment, plans_again: bool
) -> None:
    """With the plan of then, too, which names sources at a path where there are none."""
    before = contents(golden.recipe_folder)
    if plans_again:
        golden.plan()
    else:
        golden.instance.add_dynamic_partitions("golden_shards", list(SHARDS))
    result = golden.run("shards_manifest", *CACHES, "student_smoke", partition_range=ALL)
    assert result.success, failure_text(result)
    assert golden.submissions == []
    assert data_versions(golden, result) == {
        (asset, None if partition == "all" else partition): of_then["data_version"]
        for asset, partitions in expected()["results"].items()
        for partition, of_then in partitions.items()
    }
    for (asset, partition), (materialization,) in golden.materializations(result.run_id).items():
        if partition is not None:
            assert is_reused(materialization), (asset, partition)
    checks = golden.checks(result.run_id)
    assert len(checks) == len(CACHES) * len(SHARDS) * 4
    assert [check for check in checks if not check.passed] == []
    after = contents(golden.recipe_folder)
    for name in ("teacher.json", "current_variants.json", "README.md", "croissant.json", "worth.svg"):
        after.pop(name)  # stores of then have none
    assert after == before, "reuse changes no file"
    assert verify(golden.recipe_folder).ok


def test_a_cache_that_was_lost_is_made_again_and_is_the_same_result(golden: GoldenDeployment) -> None:
    """The only test that mixes: a job of today's code between results of then."""
    golden.plan()
    ((folder, of_then),) = (
        (path.parent, json.loads(path.read_bytes()))
        for path in golden.recipe_folder.glob("embedding_cache/*/golden-00001/*/manifest.json")
    )
    shutil.rmtree(folder)
    result = golden.run(*CACHES, partition=SHARDS[1])
    assert result.success, failure_text(result)
    reused = {key[0]: is_reused(m[0]) for key, m in golden.materializations(result.run_id).items()}
    assert reused == {"topk_cache": True, "hidden_state_cache": True, "embedding_cache": False}
    assert len(golden.submissions) == 1
    assert json.loads((folder / "manifest.json").read_bytes())["fingerprint"] == of_then["fingerprint"]
    assert len(TeacherCacheDataset.from_recipe(golden.recipe_folder)) == len(expected()["samples"])


@pytest.mark.parametrize(
    ("version", "stale"),
    [
        ("TOKENISING_VERSION", {"shards_manifest"}),
        ("PASS_VERSION", set(CACHES)),
        ("DRAWS_VERSION", {"topk_cache"}),
    ],
)
def test_a_raised_version_of_what_computes_makes_exactly_its_own_results_stale(
    golden: GoldenDeployment, monkeypatch: pytest.MonkeyPatch, version: str, stale: set[str]
) -> None:
    planner = planner_of(golden.recipe, golden.platform)
    shards = planner.make_plan().shards
    committed_shards = [committed(Path(o.path), o.fingerprint) for o in map(planner.shards_output, shards)]
    code_versions = {asset: golden.recipe.code_version(asset) for asset in golden.everything}

    monkeypatch.setattr(computing_versions, version, 2)
    found = {asset for asset in golden.everything if golden.recipe.code_version(asset) != code_versions[asset]}
    assert found == stale, "in Dagster"
    missing = set()
    for shard, manifest in zip(shards, committed_shards, strict=True):
        assert manifest is not None
        outputs = [planner.shards_output(shard)]
        # Of the shard of then: one that comes out the same keeps its caches.
        outputs += [planner.cache_output(asset, shard.partition_key, manifest) for asset in CACHES]
        missing |= {(o.asset, shard.partition_key) for o in outputs if committed(Path(o.path), o.fingerprint) is None}
    assert missing == {(asset, shard.partition_key) for asset in stale for shard in shards}, "in the store"


def test_a_raised_version_of_the_draws_leaves_a_cache_without_draws_alone(
    golden: GoldenDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(golden.recipe, topk=TopkParams(k=4, max_length=24))
    planner = planner_of(recipe, golden.platform)
    shard = planner.make_plan().shards[0]
    manifest = read_manifest(Path(planner.shards_output(shard).path))

    def named() -> tuple[str, str]:
        output = planner.cache_output("topk_cache", shard.partition_key, manifest)
        return recipe.code_version("topk_cache"), output.fingerprint

    before = named()
    monkeypatch.setattr(computing_versions, "DRAWS_VERSION", 2)
    assert named() == before


@pytest.mark.slow
def test_shards_made_anew_have_the_bytes_of_then(anew: GoldenDeployment) -> None:
    (manifest_file, *_) = FOLDER.glob("store/golden/shards_manifest/*/*/*/manifest.json")
    of_then = json.loads(manifest_file.read_bytes())["provenance"]["libraries"]["pyarrow"]
    if pa.__version__ != of_then:
        pytest.skip(f"another pyarrow ({pa.__version__}, then {of_then}) may write other bytes: FORMAT.md, F45")
    assert results_of(anew.recipe_folder)["shards_manifest"] == expected()["results"]["shards_manifest"]


@pytest.mark.slow
def test_results_made_anew_have_the_names_of_then(anew: GoldenDeployment) -> None:
    """Fingerprint and variant. Those of a result name the content it was made of, so that of the student follows the
    last bits of the caches: where they are not those of then, only its variant is compared."""
    found, of_then = results_of(anew.recipe_folder), expected()["results"]
    if versions(found["shards_manifest"]) != versions(of_then["shards_manifest"]):
        pytest.skip("another pyarrow wrote other bytes, which the fingerprints of all caches name: FORMAT.md, F45")
    for asset in ("shards_manifest", *CACHES):
        assert names(found[asset]) == names(of_then[asset]), asset
    assert found["student_smoke"]["all"]["variant"] == of_then["student_smoke"]["all"]["variant"]
    if all(versions(found[asset]) == versions(of_then[asset]) for asset in CACHES):
        assert names(found["student_smoke"]) == names(of_then["student_smoke"])


@pytest.mark.slow
def test_caches_made_anew_have_the_numbers_of_then(anew: GoldenDeployment) -> None:
    of_then = TeacherCacheDataset.from_recipe(FOLDER / "store" / RECIPE)
    found = TeacherCacheDataset.from_recipe(anew.recipe_folder)
    assert found.keys == of_then.keys
    different = []
    for i, key in enumerate(of_then.keys):
        sample_of_then, sample = of_then[i], found[i]
        assert sample.keys() == sample_of_then.keys()
        different += [(key, name) for name in sample if not is_same(name, sample[name], sample_of_then[name])]
    assert different == []


def is_same(field: str, value: Any, value_of_then: Any) -> bool:
    """Whether two values of a sample's field differ by no more than `LAST_BITS`."""
    if not isinstance(value_of_then, torch.Tensor):
        return bool(value == value_of_then)
    if (value.dtype, value.shape) != (value_of_then.dtype, value_of_then.shape):
        return False
    rtol, atol = LAST_BITS.get(field, (0.0, 0.0))
    return torch.allclose(value.double(), value_of_then.double(), rtol=rtol, atol=atol)


def contents(recipe_folder: Path) -> dict[str, str]:
    """File → SHA-256, of everything but the plan, which names today's paths."""
    return {
        str(path.relative_to(recipe_folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(recipe_folder.rglob("*"))
        if path.is_file() and "shard_plan" not in path.parts
    }


def data_versions(
    deployment: GoldenDeployment, result: dg.ExecuteInProcessResult
) -> dict[tuple[str, str | None], str | None]:
    """(asset, partition) → the data version that the run recorded of it, once."""
    found = deployment.materializations(result.run_id)
    return {key: (materialization.tags or {}).get(DATA_VERSION) for key, (materialization,) in found.items()}


def versions(partitions: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {partition: result["data_version"] for partition, result in partitions.items()}


def names(partitions: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {partition: (result["variant"], result["fingerprint"]) for partition, result in partitions.items()}
