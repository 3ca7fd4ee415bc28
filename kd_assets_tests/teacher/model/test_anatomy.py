"""What is proved of a model on loading, and what is said of one that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kd_assets.contract import HiddenStateParams
from kd_assets.errors import TeacherError
from kd_assets.store import read_manifest
from kd_assets.teacher.model.anatomy import lists_of_blocks, possible_decoders
from kd_assets.teacher.model.load import as_teacher, load_teacher
from kd_assets_tests.teacher.tiny import (
    HIDDEN_SIZE,
    N_BLOCKS,
    VOCABULARY,
    Desk,
    save_teacher,
    tiny_documents,
    tiny_model,
    tiny_params,
)

CPU = torch.device("cpu")
PROJECTED = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
"""OPT 350M: its blocks are wider than its embeddings and its final states."""


def ignore(message: str) -> None:
    pass


@pytest.mark.parametrize(
    ("architecture", "decoder", "blocks"),
    [
        ("llama", "model", "layers"),
        ("gpt2", "transformer", "h"),
        ("opt", "model.decoder", "layers"),
        ("bert_decoder", "bert", "encoder.layer"),
        ("llama4_text", "model", "layers"),  # its get_decoder() gives the model itself
        ("modernbert_decoder", "model", "layers"),  # its `decoder` is a part of the head
        ("gemma3_multimodal", "model.language_model", "layers"),
    ],
)
def test_decoder_and_blocks_are_found_whatever_they_are_called(architecture: str, decoder: str, blocks: str) -> None:
    model = tiny_model(architecture)
    teacher = as_teacher(model, device=CPU)
    assert teacher.decoder is model.get_submodule(decoder)
    assert teacher.blocks is teacher.decoder.get_submodule(blocks)
    assert teacher.blocks_unusable is None


def test_no_hook_is_left_on_a_model() -> None:
    """transformers leaves one on every layer once it was asked for hidden states: compiled blocks would break there."""
    model = tiny_model("llama")
    as_teacher(model, device=CPU)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.inference_mode():
        output = model(torch.arange(5)[None], output_hidden_states=True)
    assert len(output.hidden_states) == N_BLOCKS + 1


def test_hooks_that_were_there_stay() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        model(torch.arange(5)[None], output_hidden_states=True)
        as_teacher(model, device=CPU)
        assert len(model(torch.arange(5)[None], output_hidden_states=True).hidden_states) == N_BLOCKS + 1


def test_encoder_is_refused() -> None:
    with pytest.raises(TeacherError, match="not causal"):
        as_teacher(tiny_model("bert_decoder", is_decoder=False), device=CPU)


def test_model_that_needs_more_than_token_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    original = model.forward

    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        return original(**kwargs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(TeacherError, match=r"LlamaForCausalLM does not run on token ids alone .*pixel_values"):
        as_teacher(model, device=CPU)


def test_decoder_that_gets_more_than_token_ids_from_its_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by itself it would give other states."""
    model = tiny_model("llama")
    original = model.forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return original(inputs_embeds=2 * model.get_input_embeddings()(input_ids), **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(TeacherError, match="none of LlamaModel gives from token ids alone"):
        as_teacher(model, device=CPU)


def test_model_without_a_head_is_refused() -> None:
    model = transformers.LlamaModel(tiny_model("llama").config)
    with pytest.raises(TeacherError, match="no part from an embedding table up to a language-model head"):
        possible_decoders(model)


def test_lists_of_experts_are_no_blocks() -> None:
    """As many experts as blocks, and deeper."""
    model = tiny_model("jamba", num_experts=N_BLOCKS)
    (blocks,) = lists_of_blocks(model.model, N_BLOCKS)
    assert blocks is model.model.layers


def test_block_that_runs_twice_has_no_state_to_keep() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    teacher = as_teacher(model, device=CPU)
    assert teacher.blocks_unusable == (
        "LlamaForCausalLM: block 0 runs 2 times in one pass, so that its output is not one layer's"
    )


def test_list_in_another_order_than_its_model_runs_it_is_not_taken_for_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    first, second, third = model.model.layers
    listed, ran = nn.ModuleList([second, first, third]), nn.ModuleList([first, second, third])
    original = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        model.model.layers = ran
        try:
            return original(*args, **kwargs)
        finally:
            model.model.layers = listed

    model.model.layers = listed
    monkeypatch.setattr(model.model, "forward", forward)
    assert as_teacher(model, device=CPU).blocks_unusable == (
        "LlamaForCausalLM: the output of block 0 is none of what transformers gives as hidden_states"
    )


def test_teacher_whose_blocks_give_no_states_keeps_the_other_caches(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", "opt", **PROJECTED)
    everything = tiny_params(folder, hidden_states=HiddenStateParams(blocks=(0,), max_length=8))
    with pytest.raises(TeacherError, match=r"hidden states of .* block 0 gives .* leave hidden_states out of the rec"):
        load_teacher(everything, digests=None, warn=ignore)
    desk, params = Desk(tmp_path), tiny_params(folder, hidden_states=None)
    unit = desk.unit(desk.commit_shard(tiny_documents([5, 9])), params, ("topk_cache", "embedding_cache"))
    desk.run(params, unit)
    assert all(read_manifest(Path(o.path)).checks["recomputed"]["passed"] for o in unit.outputs)
    assert load_teacher(params, digests=None, warn=ignore).hidden_size == HIDDEN_SIZE // 2


def test_token_id_without_a_column_in_the_logits_is_none_of_the_teachers() -> None:
    """Llama 3.2 Vision has eight rows of embeddings more than logits."""
    teacher = as_teacher(tiny_model("mllama"), device=CPU)
    assert teacher.model.get_input_embeddings().weight.shape[0] == VOCABULARY + 8
    assert (teacher.vocabulary_size, teacher.n_token_ids) == (VOCABULARY, VOCABULARY)


@pytest.mark.parametrize(("architecture", "routed"), [("llama", False), ("granite", False), ("mixtral", True)])
def test_teacher_with_experts_is_known(architecture: str, routed: bool) -> None:
    assert as_teacher(tiny_model(architecture), device=CPU).routed is routed
