"""Where a model is found: what `model_files.folder` promises over `huggingface_hub`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from kd_assets.errors import MissingInputError
from kd_assets.model_files.folder import model_folder
from kd_assets_tests.model_files.hub_cache import COMMIT, make_snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_folder_is_the_model_whatever_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a model").mkdir()
    assert model_folder(str(tmp_path / "a model"), "main") == tmp_path / "a model"
    monkeypatch.chdir(tmp_path)
    assert model_folder("a model", None) == tmp_path / "a model"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1", COMMIT])
def test_a_hub_id_leads_to_its_snapshot_by_branch_tag_and_commit(hub: Path, revision: str | None) -> None:
    snapshot = make_snapshot(hub, **{"v1.0": COMMIT, "refs/pr/1": COMMIT})
    assert model_folder("org/tiny", revision) == snapshot


def test_the_cache_is_found_as_the_hub_library_finds_it(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "hub", "tiny")
    code = "from kd_assets.model_files.folder import model_folder; print(model_folder('tiny', None))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(snapshot)


def test_files_that_were_never_downloaded_are_not_missed(hub: Path) -> None:
    """A service node has the tokenizer alone; the library keeps the list of all files (huggingface_hub 2)."""
    snapshot = make_snapshot(hub)
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    tree = {"format_version": 1, "files": {"model.safetensors": {"size": 9, "blob_id": "0" * 40}}}
    (trees / f"{COMMIT}.json").write_text(json.dumps(tree))
    assert model_folder("org/tiny", None) == snapshot


def test_a_model_that_is_not_here_is_refused_with_the_command_that_fetches_it(hub: Path) -> None:
    make_snapshot(hub)
    with pytest.raises(MissingInputError, match=rf"{hub}.*hf download org/other --revision v2.*HF_HOME"):
        model_folder("org/other", "v2")
    with pytest.raises(MissingInputError, match="revision v2"):
        model_folder("org/tiny", "v2")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "model",
    ["", "/no/such/folder", "./nowhere", "a/b/c", "../../no-such", "~nobody-here/x", "org/..", "a\0b", "~/no-such"],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(MissingInputError, match="no model folder"):
        model_folder(model, None)


@pytest.mark.parametrize("revision", ["../../..", "..", ".", "/", "\0"])
def test_a_revision_cannot_lead_out_of_the_cache(hub: Path, revision: str) -> None:
    make_snapshot(hub)
    with pytest.raises(MissingInputError):
        model_folder("org/tiny", revision)


def test_neither_torch_nor_transformers_is_imported() -> None:
    """The control plane and the store's machines look at models, too."""
    code = (
        "import sys\n"
        "import kd_assets.model_files.placement, kd_assets.model_files.size, kd_assets.model_files.fingerprints\n"
        "from kd_assets.model_files.folder import model_folder\n"
        "from kd_assets.model_files.safetensors_file import stored_tensors\n"
        "for look in (lambda: model_folder('org/none', None), lambda: stored_tensors('/nothing')):\n"
        "    try:\n"
        "        look()\n"
        "    except Exception as e:\n"
        "        assert type(e).__name__ == 'MissingInputError', e\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"huggingface_hub", "safetensors"} <= imported
    assert not {"torch", "transformers", "tokenizers", "dagster", "pydantic"} & imported
