"""What was committed before is found, whole, and reads as the same numbers; whatever has become of the code since.

The store beside this file was made once (see `make`), in another folder than the one it is read from here. This half
needs no dagster; `test_golden_deployment` is the other.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kd_assets.cli import main
from kd_assets.contract import CACHES
from kd_assets.store import read_manifest, variants_of, verify
from kd_assets_tests.golden.facts import (
    FOLDER,
    RECIPE,
    batch_of,
    documents_of,
    expected,
    first_prediction,
    results_of,
    samples_of,
)

ASSETS = ("shards_manifest", *CACHES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden store at another path, its files new."""
    copied: Path = tmp_path_factory.mktemp("golden") / "moved to here" / "store"
    shutil.copytree(FOLDER / "store", copied, copy_function=shutil.copyfile)
    return copied


def test_every_hash_and_count_of_the_golden_store_is_right(store: Path) -> None:
    report = verify(store)
    assert report.problems == ()
    assert report.notes == (), "each result is audited, and no file is left over"
    assert report.n_results == sum(len(partitions) for partitions in expected()["results"].values()) == 13


def test_the_command_line_verifies_the_golden_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store)]) == 0
    assert capsys.readouterr().out.endswith("all hashes and counts are right\n")


@pytest.mark.parametrize("asset", [*ASSETS, "student_smoke"])
def test_the_heads_lead_to_the_golden_results(store: Path, asset: str) -> None:
    of_then = expected()["results"][asset]
    found = {
        (variant, partition): read_manifest(folder)
        for variant, heads in variants_of(store / RECIPE / asset).items()
        for partition, folder in heads.items()
    }
    assert {
        partition: {
            "variant": variant,
            "fingerprint": manifest.fingerprint,
            "data_version": manifest.data_version,
            "parts": {part.name: part.sha256 for part in manifest.parts},
        }
        for (variant, partition), manifest in found.items()
    } == of_then


def test_the_facts_written_beside_the_golden_store_are_those_of_its_files(store: Path) -> None:
    assert results_of(store / RECIPE) == expected()["results"]


@pytest.mark.parametrize("asset", ASSETS)
def test_a_reader_gives_every_document_bit_for_bit_as_then(store: Path, asset: str) -> None:
    documents = documents_of(store / RECIPE, asset)
    assert documents == expected()["documents"][asset]
    assert list(documents) == list(expected()["documents"][asset]), "in the order of then"


def test_a_student_gets_every_sample_bit_for_bit_as_then(store: Path) -> None:
    samples = samples_of(store / RECIPE)
    assert samples == expected()["samples"]
    assert list(samples) == list(expected()["samples"]), "in the order of then"


def test_a_batch_of_samples_is_padded_and_masked_as_then(store: Path) -> None:
    assert batch_of(store / RECIPE) == expected()["batch"]


def test_the_first_prediction_is_the_one_of_then(store: Path) -> None:
    assert first_prediction(store / RECIPE) == expected()["first_prediction"]
