"""Committed caches are recomputed at any time, by whoever has the teacher, and a number that was changed is found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from kd_assets import cli
from kd_assets.contract import Asset, HiddenStateParams, PositionChoice, TeacherParams, TopkParams, WorkUnit
from kd_assets.durable import atomic_file
from kd_assets.store import plan_output
from kd_assets.store.params_in_identity import params_in_identity
from kd_assets.store.partfile import PartFile, part_suffix, write_table
from kd_assets_tests.store.test_verify import adopt_files
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

ASSETS: tuple[Asset, ...] = ("topk_cache", "hidden_state_cache", "embedding_cache")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def made(tmp_path: Path, teacher_folder: Path) -> tuple[Desk, WorkUnit]:
    desk, params = Desk(tmp_path), params_of(teacher_folder)
    unit = unit_of(desk, params)
    desk.run(params, unit)
    return desk, unit


def params_of(folder: Path) -> TeacherParams:
    learned = PositionChoice(kept="learned")
    return tiny_params(
        folder,
        topk=TopkParams(k=4, max_length=64, draws=5, positions=learned),
        hidden_states=HiddenStateParams(blocks=(1,), max_length=20, final=("before_norm", "after_norm")),
    )


def unit_of(desk: Desk, params: TeacherParams) -> WorkUnit:
    """With identities as the planner makes them."""
    unit = desk.unit(desk.commit_shard(tiny_documents((3, 20, 64, 9, 30, 2))), params, assets=ASSETS)
    assert params.topk is not None
    assert params.hidden_states is not None
    assert params.embeddings is not None
    words = {
        "topk_cache": params_in_identity(params.topk, seed=params.seed),
        "hidden_state_cache": params_in_identity(params.hidden_states, seed=params.seed),
        "embedding_cache": params_in_identity(params.embeddings, seed=params.seed),
    }
    common = {"weights_fingerprint": params.weights_fingerprint, "dtype": "float32"}
    outputs = [
        plan_output(
            output.asset,
            {**output.identity, **common, "params": words[output.asset]},
            recipe_folder=desk.recipe_folder,
            partition_key=unit.partition_key,
        )
        for output in unit.outputs
    ]
    return dataclasses.replace(unit, outputs=tuple(outputs))


def test_what_was_committed_is_recomputed_and_agrees(
    made: tuple[Desk, WorkUnit], capsys: pytest.CaptureFixture[str]
) -> None:
    desk, unit = made
    assert cli.main(["verify", str(desk.recipe_folder), "--recompute", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "3 results recomputed, 0 differ beyond tolerance" in out
    for output in unit.outputs:
        assert f"{output.path}: recomputed, as it is stored: n_documents=4" in out
    assert cli.main(["verify", str(desk.recipe_folder), "--recompute", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {record["asset"] for record in found["recomputed"]} == set(ASSETS)
    assert all(record["passed"] for record in found["recomputed"])


@pytest.mark.parametrize("asset", ASSETS)
def test_a_number_that_was_written_wrong_is_found_though_every_hash_is_right(
    made: tuple[Desk, WorkUnit], asset: Asset, capsys: pytest.CaptureFixture[str]
) -> None:
    (output,) = (o for o in made[1].outputs if o.asset == asset)
    folder = Path(output.path)
    name = {"topk_cache": "logsumexp", "hidden_state_cache": "hidden_final_before_norm"}.get(asset, "mean_embedding")
    for path in sorted(folder.glob("part-*")):
        with PartFile(path) as part:
            table = part.read(part.schema.names)
        column = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        rows = [np.roll(np.asarray(row, dtype=object), 1, axis=0).tolist() for row in column.to_pylist()]
        wrong = table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), pa.array(rows, type=column.type)
        )
        with atomic_file(path) as file:
            write_table(wrong, part_suffix(asset), file)
    adopt_files(folder)
    assert cli.main(["verify", str(folder), "--recompute", "6", "--json"]) == 1
    (record,) = json.loads(capsys.readouterr().out)["recomputed"]
    assert record["passed"] is False


def test_a_teacher_of_other_weights_is_refused(
    made: tuple[Desk, WorkUnit], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk, _ = made
    other = save_teacher(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    first = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    save_file(weights | {first: weights[first] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["verify", str(desk.recipe_folder), "--recompute", "1", "--teacher", str(other)]) != 0
    assert "are not those" in (err := capsys.readouterr().err) or "changed" in err
    missing = str(tmp_path / "nowhere")
    assert cli.main(["verify", str(desk.recipe_folder), "--recompute", "1", "--teacher", missing]) != 0
    assert "nowhere" in capsys.readouterr().err


def test_without_torch_it_says_what_is_missing(made: tuple[Desk, WorkUnit]) -> None:
    program = "import sys; sys.modules['torch'] = None; from kd_assets.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "verify", str(made[0].recipe_folder), "--recompute", "1"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert "this command needs torch, which is not installed here" in found.stderr
