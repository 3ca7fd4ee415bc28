"""The sick-cluster campaign sees what goes wrong: faults are planted in a round of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets_tests.campaign import cluster_rounds
from kd_assets_tests.campaign.cluster_rounds import DISTURBANCES, ClusterRound
from kd_assets_tests.campaign.ledger import Record
from kd_assets_tests.slurm.background import part_files
from kd_assets_tests.slurm.cluster import SlurmCluster, wait_until
from kd_assets_tests.slurm.deployment import KEYS

Plant = Callable[[ClusterRound, random.Random], None]


@pytest.fixture(scope="module")
def expected(slurm: SlurmCluster, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return ClusterRound(tmp_path_factory.mktemp("undisturbed"), slurm, tiny_teacher).undisturbed()


@pytest.fixture
def round_with(
    slurm: SlurmCluster,
    tiny_teacher: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Plant], Record]:
    """What a round says in which this happened."""

    def said(plant: Plant) -> Record:
        monkeypatch.setitem(DISTURBANCES, "planted", plant)
        return ClusterRound(tmp_path / "round", slurm, tiny_teacher).disturbed(random.Random(0), ["planted"], expected)

    return said


def recorded_parts(round_: ClusterRound) -> list[Path]:
    """Parts of results that the run has recorded with their checks, which are written together: it looks at them no
    more."""
    deployment = round_.deployment
    check = dg.AssetCheckKey(deployment.recipe.key("topk_cache"), "complete")
    history = deployment.instance.event_log_storage.get_asset_check_execution_history(check, limit=100)
    evaluated = [r.event.dagster_event for r in history if r.event is not None]
    checked = {getattr(e.event_specific_data, "partition", None) for e in evaluated if e is not None}
    return [path for path in part_files(deployment) if path.parents[1].name in checked]


def test_a_round_in_which_nothing_goes_wrong_is_clean(round_with: Callable[[Plant], Record]) -> None:
    record = round_with(lambda round_, rng: None)
    assert (record["bad"], record["lost"], record["bytes_differing"], record["made_twice"]) == ([], 0, 0, 0)


def test_a_part_that_vanishes_is_lost(round_with: Callable[[Plant], Record]) -> None:
    def vanish(round_: ClusterRound, rng: random.Random) -> None:
        wait_until("something is recorded", lambda: recorded_parts(round_))
        recorded_parts(round_)[0].unlink()

    assert round_with(vanish)["lost"] > 0


def test_a_byte_that_flips_differs(round_with: Callable[[Plant], Record]) -> None:
    def flip(round_: ClusterRound, rng: random.Random) -> None:
        wait_until("something is recorded", lambda: recorded_parts(round_))
        path = recorded_parts(round_)[0]
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])

    record = round_with(flip)
    assert (record["bytes_differing"], record["lost"] > 0) == (1, True)
    assert any("bytes differ" in words for words in record["bad"])


@pytest.fixture
def takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is not over before something happens to it."""
    monkeypatch.setattr(cluster_rounds, "PART_S", 10.0)


@pytest.mark.usefixtures("takes_its_time")
def test_a_run_that_fails_by_itself_is_lost(round_with: Callable[[Plant], Record]) -> None:
    def fail(round_: ClusterRound, rng: random.Random) -> None:
        round_.deployment.tell({"units": dict.fromkeys(KEYS, "fail")})
        round_.cluster.run("scancel", "--signal=KILL", *(line.split()[0] for line in round_.deployment.alive()))

    record = round_with(fail)
    assert record["lost"] == 1
    assert record["bad"][0].startswith("the run failed")


@pytest.mark.usefixtures("takes_its_time")
def test_a_run_that_does_not_end_is_stuck(
    round_with: Callable[[Plant], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_rounds, "RUN_S", 0.2)
    record = round_with(lambda round_, rng: None)
    assert record["stuck"] == 1
    assert record["bad"][0].startswith("the run does not end")
