"""Code that comes with a model: refused unless the recipe allows it; then the folder's own runs, and is recorded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import save_file

from kd_assets.contract import TeacherParams
from kd_assets.errors import RecipeError, TeacherChangedError
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.store import CacheReader, read_manifest
from kd_assets.teacher.model.configuration import keep_to_this_machine
from kd_assets.teacher.model.load import load_teacher
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

CONFIGURATION = """
from transformers import PretrainedConfig

class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size=200, hidden_size=32, num_hidden_layers=3, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from .configuration_odd import OddConfig

class OddBlock(nn.Module):
    "Mixes each token with the mean of all up to it."

    def __init__(self, hidden_size):
        super().__init__()
        self.mix = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BTH):
        n_T1 = torch.arange(1, x_BTH.shape[1] + 1, device=x_BTH.device, dtype=x_BTH.dtype).unsqueeze(1)
        return x_BTH + torch.tanh(self.mix(x_BTH.cumsum(1) / n_T1))

class OddPreTrainedModel(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "model"

class OddModel(OddPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OddBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, use_cache=None, output_hidden_states=False):
        states = [self.embed_tokens(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        final = self.norm(states.pop())
        return BaseModelOutput(final, hidden_states=(*states, final) if output_hidden_states else None)

class OddForCausalLM(OddPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OddModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prior = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        output = self.model(input_ids, **kwargs)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutput(logits=torch.sinh(logits) + self.prior, hidden_states=output.hidden_states)
"""

AUTO_MAP = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}


@pytest.fixture(autouse=True)
def modules_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies such code to a folder in the home before it imports it: here to one of the test's."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in imported():
        del sys.modules[name]


def imported() -> list[str]:
    return [name for name in sys.modules if name.startswith("transformers_modules")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose logits are not what a linear layer makes of its final states."""
    return odd_teacher(tmp_path / "odd teacher")


def odd_teacher(folder: Path, auto_map: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (200, 32),
        **{f"model.layers.{n}.mix.weight": (32, 32) for n in range(3)},
        **{f"model.layers.{n}.mix.bias": (32,) for n in range(3)},
        "model.norm.weight": (32,),
        "model.norm.bias": (32,),
        "lm_head.weight": (200, 32),
        "prior": (200,),
    }
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": auto_map or AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_odd.py").write_text(CONFIGURATION)
    (folder / "modeling_odd.py").write_text(MODELING)
    return folder


def allowed(folder: Path, **changes: Any) -> TeacherParams:
    fingerprint = weights_fingerprint(folder, None, remote_code=True)
    return tiny_params(folder, trust_remote_code=True, weights_fingerprint=fingerprint, **changes)


def ignore(message: str) -> None:
    pass


def test_code_that_comes_with_a_model_is_refused_and_the_message_says_how_to_allow_it(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"odd teacher needs Python code .*`teacher\.trust_remote_code: true`"):
        load_teacher(tiny_params(folder), digests=None, warn=ignore)
    assert not imported()


def test_model_that_transformers_knows_needs_none_of_the_code_beside_it(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "modeling_odd.py").write_text("raise RuntimeError('this ran')")
    load_teacher(tiny_params(folder), digests=None, warn=ignore)
    assert not imported()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allowed_code_runs_through_the_whole_pass_and_is_recorded(folder: Path, dtype: str, tmp_path: Path) -> None:
    """Its head is no linear layer: the pass takes the model's own logits, and says so."""
    desk, documents, params = Desk(tmp_path), tiny_documents([5, 30, 9]), allowed(folder, dtype=dtype)
    unit = desk.unit(desk.commit_shard(documents), params)
    desk.run(params, unit)
    manifests = [read_manifest(Path(output.path)) for output in unit.outputs]
    assert all(m.provenance["trust_remote_code"] is True for m in manifests)
    assert all(m.provenance["architecture"] == "OddForCausalLM" for m in manifests)
    assert all(m.checks["recomputed"]["passed"] for m in manifests)
    assert desk.events("teacher_loaded")[0]["head"] == "own logits"
    assert "falling back to the model's own logits" in desk.events("warning")[0]["message"]
    if dtype == "float32":
        teacher = load_teacher(params, digests=None, warn=ignore)
        with torch.inference_mode():
            ids_1L = torch.from_numpy(documents.input_ids[5:35].astype(np.int64))[None]
            plain_L = teacher.model(ids_1L).logits[0].logsumexp(1)
        (topk,) = (Path(o.path) for o in unit.outputs if o.asset == "topk_cache")
        assert np.allclose(CacheReader.from_folders([topk])[1]["logsumexp"], plain_L[:-1], atol=1e-5)


def test_code_of_another_repository_is_refused_even_where_code_is_allowed(tmp_path: Path) -> None:
    auto_map = AUTO_MAP | {"AutoModelForCausalLM": "someone/else--modeling_odd.OddForCausalLM"}
    folder = odd_teacher(tmp_path / "odd", auto_map)
    with pytest.raises(RecipeError, match=r"someone/else--modeling_odd\.OddForCausalLM.*only code in the model's own"):
        load_teacher(allowed(folder), digests=None, warn=ignore)
    assert not imported()


def test_code_that_changed_since_the_plan_is_refused_before_it_runs(folder: Path) -> None:
    params = allowed(folder)
    (folder / "configuration_odd.py").write_text(CONFIGURATION + "\n# changed\n")
    with pytest.raises(TeacherChangedError, match=r"the weights or the code in .*odd teacher are not those"):
        load_teacher(params, digests=None, warn=ignore)
    assert not imported()


def test_fingerprint_holds_the_code_where_it_may_run(folder: Path) -> None:
    def both() -> tuple[str, str]:
        return weights_fingerprint(folder, None), weights_fingerprint(folder, None, remote_code=True)

    without, with_code = both()
    assert without != with_code
    (folder / "layers").mkdir()
    (folder / "layers" / "more.py").write_text("x = 1")
    assert both()[0] == without
    assert both()[1] != with_code


def test_copies_of_the_code_lie_in_a_folder_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the home they would be written by all tasks at once."""
    for name in ("HF_MODULES_CACHE", "HF_HUB_OFFLINE", "USE_HUB_KERNELS"):
        monkeypatch.setenv(name, "anything")  # so that it is put back
        monkeypatch.delenv(name)
    keep_to_this_machine(remote_code=False)
    assert "HF_MODULES_CACHE" not in os.environ
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["USE_HUB_KERNELS"]) == ("1", "NO")
    keep_to_this_machine(remote_code=True)
    assert Path(os.environ["HF_MODULES_CACHE"]).is_dir()
