"""`kd-assets doctor` finds what it looks for. Without a cluster; with one: `slurm/test_doctor.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kd_assets.diagnose import doctor
from kd_assets.diagnose.cluster import gpus_of, misfits_of
from kd_assets.diagnose.compute_python import check_local_python
from kd_assets.diagnose.disk import check_space, check_teacher, check_weights
from kd_assets.diagnose.doctor import examine
from kd_assets.diagnose.finding import Finding, Status, safely
from kd_assets.diagnose.node_probe import Probe, probe_argv, read_answer
from kd_assets.diagnose.nodes import probe_findings
from kd_assets.model_files import digests
from kd_assets.orchestration.billing.space import bytes_needed
from kd_assets.orchestration.platform import Platform
from kd_assets.scheduler import Profile, Resources
from kd_assets.scheduler.slurm.commands.parsing import PartitionInfo
from kd_assets_tests.model_files.hub_cache import link_blob
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment

USAGE = namedtuple("USAGE", "total used free")
LOCAL = Profile(name="local")
SECRET = "hf_a secret of this test"


@pytest.fixture(autouse=True)
def no_secrets_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)


def one(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_sound_deployment_is_ok(deployment: Deployment) -> None:
    found = list(examine(deployment.recipe, deployment.platform))
    assert [f.what for f in found] == [
        "scheduler",
        "KD_HOME",
        "variables",
        "sources",
        "licences",
        "free space",
        "weights",
        "teacher",
        "secrets",
        "compute python",
        "GPU",
    ]
    assert {f.status for f in found if f.what != "GPU"} == {Status.OK}
    assert all("\n" not in str(f) for f in found)


def test_a_finding_is_one_line_that_names_the_fix() -> None:
    finding = Finding(status=Status.FAIL, what="KD_HOME", found="full\nof lines", fix="do this")
    assert str(finding) == "FAIL KD_HOME: full of lines → do this"
    assert str(Finding(status=Status.OK, what="GPU", found="there")) == "ok   GPU: there"


def test_a_wrong_scheduler_or_profile_is_a_finding(deployment: Deployment, tmp_path: Path) -> None:
    wrong = Platform(home=str(tmp_path), scheduler="slurm", slurm_profile="nowhere")
    finding = one(examine(deployment.recipe, wrong))
    assert finding.status is Status.FAIL
    assert "no cluster profile 'nowhere'" in finding.found


def test_a_home_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    finding = one(doctor.check_home(Platform(home=str(tmp_path / "a file"))))
    assert finding.status is Status.FAIL
    assert "cannot be written" in finding.found


@pytest.mark.parametrize(("free", "status"), [(1_000, Status.FAIL), (10**12, Status.OK)])
def test_free_space_is_held_against_the_plan(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, free: int, status: Status
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: USAGE(10**13, 0, free))
    finding = one(check_space(deployment.recipe, deployment.platform))
    assert finding.status is status
    assert "of the shard plan take at most" in finding.found


def test_free_space_before_there_is_a_plan_goes_by_every_file_of_a_source(deployment: Deployment) -> None:
    (source,) = deployment.recipe.sources
    shutil.rmtree(deployment.platform.recipe_folder("tiny") / "shard_plan")
    path = Path(str(source.spec.path).replace("$KD_HOME", str(deployment.home)))
    folder = deployment.home / "several"
    folder.mkdir()
    for name in "ab":
        shutil.copy(path, folder / f"{name}.jsonl")
    spec = dataclasses.replace(source.spec, path=str(folder))
    recipe = dataclasses.replace(deployment.recipe, sources=(dataclasses.replace(source, spec=spec),))
    finding = one(check_space(recipe, deployment.platform))
    assert finding.status is Status.OK
    assert f"{2 * path.stat().st_size // 4:,} tokens of the sources (no shard plan yet)" in finding.found


def test_the_estimate_is_not_below_what_the_caches_really_take(deployment: Deployment) -> None:
    assert deployment.run("shards_manifest", *CACHES, partition_range=(SHARDS[0], SHARDS[-1])).success
    manifests = [json.loads(p.read_bytes()) for p in (deployment.home / "store").rglob("manifest.json")]
    shards = [m for m in manifests if m["asset"] == "shards_manifest"]
    n_tokens, n_documents = sum(m["n_tokens"] for m in shards), sum(m["n_documents"] for m in shards)
    needed = bytes_needed(deployment.recipe, n_tokens, n_documents, hidden_size=32)
    for asset, most in needed.items():
        # Small part files are mostly headers and schemas.
        real = sum(m["n_bytes"] - 4096 * len(m["parts"]) for m in manifests if m["asset"] == asset)
        assert real <= most, asset


def with_teacher(deployment: Deployment, folder: Path) -> Deployment:
    """The deployment with a copy of its teacher in `folder`."""
    shutil.copytree(deployment.attributes["teacher"]["model_id"], folder)
    return Deployment(deployment.home, folder, deployment.instance)


def test_weights_that_are_no_whole_files_are_named(deployment: Deployment, tmp_path: Path) -> None:
    changed = with_teacher(deployment, tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model-2.safetensors").write_bytes(whole[:-5])
    (tmp_path / "model" / "model-3.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "model" / "model.safetensors").unlink()
    name_weights(tmp_path / "model", "model-2.safetensors", "model-3.safetensors")
    finding = one(check_weights(changed.recipe, changed.platform))
    assert finding.status is Status.FAIL
    for name in ("model-2.safetensors", "model-3.safetensors"):
        assert f"{name} is no whole safetensors file" in finding.found


def test_weights_whose_bytes_are_not_what_they_were_are_found_by_reading_them(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    changed = with_teacher(deployment, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    findings = examine(changed.recipe, changed.platform, verify_weights=True)
    assert "with the right hashes" in one(f for f in findings if f.what == "weights").found
    # A disk that gives other bytes under the same status cannot be had: the digest is changed in its place.
    changed.platform.digests().put(weights, weights.stat(), "f" * 64)
    assert one(check_weights(changed.recipe, changed.platform)).status is Status.OK, "nothing is read"
    finding = one(check_weights(changed.recipe, changed.platform, verify=True))
    assert finding.status is Status.FAIL
    assert "model.safetensors is damaged: its SHA-256 is" in finding.found


def test_a_damaged_blob_of_the_hugging_face_cache_is_found_by_its_name(deployment: Deployment, tmp_path: Path) -> None:
    source = Path(deployment.attributes["teacher"]["model_id"])
    link = link_blob(tmp_path / "hub", "model.safetensors", (source / "model.safetensors").read_bytes())
    for path in source.iterdir():
        if path.name != link.name:
            shutil.copy(path, link.with_name(path.name))
    from_hub = Deployment(deployment.home, link.parent, deployment.instance)
    assert one(check_weights(from_hub.recipe, from_hub.platform, verify=True)).status is Status.OK
    with link.open("r+b") as blob:
        blob.seek(-1, os.SEEK_END)
        blob.write(b"\xff")
    finding = one(check_weights(from_hub.recipe, from_hub.platform, verify=True))
    assert finding.status is Status.FAIL
    assert "model.safetensors is damaged" in finding.found


def test_an_index_names_the_files_that_must_be_there(deployment: Deployment, tmp_path: Path) -> None:
    changed = with_teacher(deployment, tmp_path / "model")
    name_weights(tmp_path / "model", "model-00002.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    finding = one(check_weights(changed.recipe, changed.platform))
    assert finding.status is Status.FAIL
    assert "lacks model-00002.safetensors, which its index names" in finding.found


def test_two_sets_of_weights_fail(deployment: Deployment, tmp_path: Path) -> None:
    changed = with_teacher(deployment, tmp_path / "model")
    name_weights(tmp_path / "model", "model-00002.safetensors")
    finding = one(check_weights(changed.recipe, changed.platform))
    assert finding.status is Status.FAIL
    assert "holds two sets of weights: model.safetensors" in finding.found


def name_weights(folder: Path, *names: str) -> None:
    weight_map = {f"w{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_weights_that_are_nowhere_fail(deployment: Deployment, tmp_path: Path) -> None:
    nowhere = Deployment(deployment.home, tmp_path / "nowhere", deployment.instance)
    finding = one(check_weights(nowhere.recipe, nowhere.platform))
    assert finding.status is Status.FAIL
    assert "no model folder at" in finding.found


def asking(deployment: Deployment, folder: Path, **changes: Any) -> Deployment:
    """The same deployment with another teacher's folder and other fields of the recipe."""
    return Deployment(deployment.home, folder, deployment.instance, **changes)


def test_blocks_and_ids_that_the_teacher_does_not_have_are_found_before_a_job_loads_it(deployment: Deployment) -> None:
    teacher = Path(deployment.attributes["teacher"]["model_id"])
    caches = {"topk": {"k": 999, "max_length": 8}, "hidden_states": {"blocks": [1, 7], "max_length": 8}}
    changed = asking(deployment, teacher, caches=caches, student=None)
    found = list(check_teacher(changed.recipe, changed.platform))
    assert [f.status for f in found] == [Status.FAIL, Status.FAIL]
    assert "hidden_states.blocks has 7, and the teacher has blocks 0 to 2" in found[0].found
    assert "topk.k is 999, and its head has 300 ids" in found[1].found


def test_a_teacher_without_a_tokenizer_is_found_before_a_run(deployment: Deployment, tmp_path: Path) -> None:
    changed = with_teacher(deployment, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    finding = one(safely("teacher", lambda: check_teacher(changed.recipe, changed.platform)))
    assert finding.status is Status.FAIL
    assert "holds no tokenizer" in finding.found


def test_a_head_longer_than_the_tokenizer_is_said_before_caches_that_no_export_takes(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Path(deployment.attributes["teacher"]["model_id"])
    monkeypatch.setattr("kd_assets.diagnose.disk.token_table", lambda folder: {0: "a", 289: "b"})
    caches = {"topk": {"k": 4, "max_length": 8}}
    changed = asking(deployment, teacher, caches=caches, student=None, exports=["hf"])
    finding = one(check_teacher(changed.recipe, changed.platform))
    assert finding.status is Status.WARN
    assert "a head of 300 ids, and a tokenizer of 290" in finding.found
    assert "`vocabulary: tokenizer`" in finding.fix
    cut = asking(deployment, teacher, caches={"topk": caches["topk"] | {"vocabulary": "tokenizer"}}, student=None)
    assert one(check_teacher(cut.recipe, cut.platform)).status is Status.OK


def test_a_secret_in_a_file_is_found_and_not_shown(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert one(doctor.check_secrets(LOCAL, deployment.platform)).status is Status.OK
    log = deployment.home / "jobs" / "a.log"
    # Across the border of two reads.
    log.write_bytes(b"x" * ((1 << 20) - 5) + SECRET.encode() + b"\n")
    finding = one(doctor.check_secrets(LOCAL, deployment.platform))
    assert finding.status is Status.FAIL
    assert f"the value of HF_TOKEN stands in {log}" in finding.found
    assert SECRET not in str(finding)


def test_a_secrets_file_that_others_can_read_fails(deployment: Deployment) -> None:
    path = deployment.platform.secrets_path()
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    assert one(doctor.check_secrets(LOCAL, deployment.platform)).status is Status.OK
    path.chmod(0o640)
    found = list(doctor.check_secrets(LOCAL, deployment.platform))
    assert [f.status for f in found] == [Status.FAIL, Status.OK]
    assert f"{path} has mode 0640" in found[0].found
    path.unlink()
    path.parent.rmdir()


def test_a_python_without_what_jobs_need_fails(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -E "$@"\n')
    bare.chmod(0o755)
    finding = one(check_local_python(Platform(home=str(tmp_path), compute_python=str(bare))))
    assert finding.status is Status.FAIL
    assert "No module named" in finding.found
    missing = Platform(home=str(tmp_path), compute_python=str(tmp_path / "nothing"))
    assert one(check_local_python(missing)).fix == "set KD_COMPUTE_PYTHON"


@pytest.mark.parametrize(
    ("gres", "n"),
    [("", 0), ("gpu:4", 4), ("gpu:h100:4", 4), ("gpu:h100:4(S:0-1)", 4), ("gpu:a:2,gpu:b:3,nvme:2", 5), ("nvme:2", 0),
     ("gpu", 1), ("craynetwork:4,gpu:8(S:0-3)", 8)],
)  # fmt: skip
def test_gpus_are_counted_from_sinfos_words(gres: str, n: int) -> None:
    assert gpus_of(gres) == n


def test_what_a_node_lacks_is_said() -> None:
    node = PartitionInfo(
        name="gpu", state="up", n_nodes=2, max_time_minutes=60, cpus=8, memory_gib=4.0, gres="gpu:h100:2"
    )
    assert misfits_of(node, Resources(gpus_per_node=2, cpus=8, memory_gib=4, time_minutes=60)) == []
    assert misfits_of(node, Resources(gpus_per_node=4, cpus=9, memory_gib=5, time_minutes=61)) == [
        "4 GPUs asked for, 2 there",
        "9 CPUs asked for, 8 there",
        "5 GiB asked for, 4 there",
        "61 min asked for, 60 allowed",
    ]


# ------------------------------------------------------------------------------------------------------- probes


def a_probe(tmp_path: Path, **fields: object) -> Probe:
    return Probe(name="teacher", folder=tmp_path / "probe", nonce="n", job_id=7, **fields)  # type: ignore[arg-type]


def said_of(probe: Probe, tmp_path: Path, **asked: int) -> list[str]:
    platform = Platform(home=str(tmp_path))
    asked_for = Resources(**asked)  # type: ignore[arg-type]
    found = probe_findings(probe, asked_for, platform, 120.0, n_weights=2, model=tmp_path)
    return [str(f) for f in found]


def test_a_node_that_ended_without_a_word_seen_here_has_another_folder(tmp_path: Path) -> None:
    (line,) = said_of(a_probe(tmp_path, state="COMPLETED", node="n1", reason="None"), tmp_path)
    assert line.startswith("FAIL node for teacher: test job 7 ended on n1 (COMPLETED, None) and nothing of it is seen")


def test_a_test_job_that_waits_is_no_failure_and_says_why(tmp_path: Path) -> None:
    (line,) = said_of(a_probe(tmp_path, state="PENDING", reason="Resources"), tmp_path)
    assert line.startswith("warn node for teacher: test job 7 did not start within 120 s (Resources) and was cancelled")


def test_a_node_that_answers_is_told_what_it_lacks(tmp_path: Path) -> None:
    answer = {"node": "n1", "nonce": "other", "weights": "1", "secrets": "1", "python": "No module named 'torch'"}
    lines = said_of(a_probe(tmp_path, state="COMPLETED", answer=answer), tmp_path, gpus_per_node=1)
    assert [line[:4] for line in lines] == ["FAIL"] * 5
    for words, line in zip(
        ("does not read what was written", "no GPU visible", "1 of the 2 weight files", "as its owner", "No module"),
        lines,
        strict=True,
    ):
        assert words in line


def test_only_whole_lines_of_an_answer_count(tmp_path: Path) -> None:
    (tmp_path / "answer").write_text("node=n1\npython={\ndone")
    assert read_answer(tmp_path / "answer") == {"node": "n1", "python": "{"}
    assert read_answer(tmp_path / "no answer") == {}


def test_a_test_job_asks_for_a_minute_where_the_real_job_would_go(tmp_path: Path) -> None:
    asked = Resources(slurm_partition="h100", account="us", gpus_per_node=1, sbatch_options=("--reservation=x",))
    argv = probe_argv(a_probe(tmp_path), asked, model_folder=None, secrets_file=None)
    for word in (
        "--time=1",
        "--partition=h100",
        "--account=us",
        "--gpus-per-node=1",
        "--reservation=x",
        "--no-requeue",
    ):
        assert word in argv
    assert argv[-4:] == [f"{tmp_path}/probe/probe.sh", f"{tmp_path}/probe", "-", "-"]
