"""What the web UI says of an export: how its tool is told of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_assets.contract import CACHES, Asset, ExportParams
from kd_assets.export.formats import FORMATS
from kd_assets.orchestration.recording.metadata import LOADED_BY, export_metadata
from kd_assets.recipes.exports import CACHES_OF_FORMAT
from kd_assets_tests.export import exported, made_up

OF_STATES: tuple[Asset, ...] = ("hidden_state_cache",)

LINES = {
    "export_axolotl": "datasets: [{path: DATA, type: completion}], skip_prepare_dataset: true",
    "export_distillkit": "distillkit-pack-logits --dataset DATA --split train",
    "export_hf": 'datasets.load_dataset("DATA", split="train")',
    "export_modelopt": 'torch.load("DATA/00000000.pt")',
    "export_original": "the trainer's data folder: DATA",
    "export_safetensors": 'safetensors.safe_open("DATA/section-00000.safetensors", "pt")',
    "export_specforge": "data.hidden_states_path=DATA",
    "export_specforge_dflash": "data.hidden_states_path=DATA",
    "export_speculators": "--data-path DATA",
}
PACKED = "disk_path: DATA, prepacked: true, functionary_packing: true"


def test_every_format_has_a_line_and_no_other() -> None:
    assert set(LINES) == {f"export_{name}" for name in FORMATS}
    assert set(LOADED_BY) == {*FORMATS, "distillkit with pack_to"}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_export_says_how_its_tool_is_told_of_it(tmp_path: Path, share: float) -> None:
    pytest.importorskip("torch")
    folders = made_up.commit(tmp_path, made_up.truths(1, exported.KEY, n=40))
    cases: list[tuple[ExportParams, str]] = []
    for asset, line in LINES.items():
        states = (1, 2, 4) if CACHES_OF_FORMAT.get(asset) == OF_STATES else None  # type: ignore[call-overload]
        cases.append((ExportParams(asset=asset, states=states, validation_share=share), line))  # type: ignore[arg-type]
    cases.append((ExportParams(asset="export_distillkit", pack_to=32, validation_share=share), PACKED))
    for params, line in cases:
        caches = CACHES_OF_FORMAT.get(params.asset, CACHES)
        job = exported.job_of(tmp_path, {asset: folders[asset] for asset in caches}, [params])
        assert exported.run(job) == 0
        ((folder, manifest),) = exported.results(job)
        assert manifest is not None
        data = folder / "data" / ("train" if share else "")
        assert data.is_dir()
        assert export_metadata(manifest, folder)["how_to_load"] == line.replace("DATA", str(data))
