"""What we rely on in torch, transformers and accelerate without their promise.

A failure here after an upgrade says which piece to look at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import nn

import kd_assets
from kd_assets.library_internals import (
    any_number_of_rows,
    attention_of,
    chat_environment,
    class_that_loads,
    encoder_of,
    equal_sizes_kept_apart,
    has_compiler_settings,
    has_hooks,
    no_hooks_left,
    whole_loading_report,
)
from kd_assets.teacher.devices.compiled import LIKE_EAGER, REQUIRED_MODE
from kd_assets_tests.teacher.tiny import tiny_model

# ----------------------------------------------------------------------------------------------------- transformers


def test_the_attention_of_a_model_is_what_it_was_given() -> None:
    assert attention_of(tiny_model("llama")) == "sdpa"
    assert attention_of(tiny_model("llama", attn_implementation="eager")) == "eager"


def test_a_tokenizers_own_call_is_the_batch_call_of_the_library_below_it() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    encoder = encoder_of(tokenizer)
    assert encoder is not None
    assert [e.ids for e in encoder.encode_batch_fast(["a", "b"])] == tokenizer(["a", "b"])["input_ids"] == [[0], [0]]
    assert encoder_of(object()) is None


def test_an_auto_class_tells_what_it_makes_of_a_configuration() -> None:
    causal, multimodal = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    assert class_that_loads(causal, transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    assert class_that_loads(causal, transformers.CLIPConfig()) is None
    assert class_that_loads(multimodal, transformers.LlavaConfig()) is transformers.LlavaForConditionalGeneration


def test_a_chat_environment_is_that_of_transformers_and_one_of_its_own() -> None:
    one, other = chat_environment(), chat_environment()
    assert one is not other
    assert isinstance(one, ImmutableSandboxedEnvironment)
    assert one.from_string("{% generation %}{{ 'é' | tojson }}{% endgeneration %}").render() == '"é"'


def test_what_transformers_leaves_out_of_its_loading_report_is_told(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    weights = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1), "transformer.h.9.x": torch.ones(1)}
    del weights["lm_head.weight"]
    weights["transformer.ln_f.bias"] = torch.ones(3)
    model.save_pretrained(tmp_path, state_dict=weights)
    with whole_loading_report() as report, pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert report.unexpected == {"transformer.h.0.attn.bias", "transformer.h.9.x"}
    assert report.ignored == {"transformer.h.0.attn.bias"}
    assert report.mismatched == {"transformer.ln_f.bias": ((3,), (32,))}


def with_hidden_states(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.arange(4)[None], output_hidden_states=True, use_cache=False).hidden_states


def test_transformers_leaves_hooks_after_hidden_states_and_they_can_be_taken_off() -> None:
    """Should it leave none one day, `no_hooks_left` may go."""
    model = tiny_model("llama")
    with_hidden_states(model)
    assert any(map(has_hooks, model.modules()))

    model = tiny_model("llama")
    with no_hooks_left(model):
        first = with_hidden_states(model)
    assert not any(map(has_hooks, model.modules()))
    with no_hooks_left(model):
        again = with_hidden_states(model)
    assert len(again) == len(first) == model.config.num_hidden_layers + 1
    assert all(map(torch.equal, first, again))


def test_hooks_of_somebody_else_stay() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    with no_hooks_left(model):
        with_hidden_states(model)
    assert [name for name, module in model.named_modules() if has_hooks(module)] == ["lm_head"]


# ------------------------------------------------------------------------------------------------ torch, accelerate


def test_hooks_of_torch_are_seen() -> None:
    before, after, none = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    before.register_forward_pre_hook(lambda module, args: None)
    after.register_forward_hook(lambda module, args, output: None)
    assert [has_hooks(module) for module in (before, after, none)] == [True, True, False]


def test_hooks_of_accelerate_are_seen() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    module = nn.Linear(1, 1)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert has_hooks(module)


def test_the_compiler_has_the_settings_that_make_it_repeat_itself() -> None:
    assert has_compiler_settings((REQUIRED_MODE, LIKE_EAGER))
    assert not has_compiler_settings((REQUIRED_MODE, "no such setting"))


def graphs_of(function: Any, *, backend_calls: list[torch.fx.GraphModule], dynamic: bool | None = None) -> Any:
    """The function compiled by a backend that only notes what it was given: needs no C compiler."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        backend_calls.append(graph)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def test_rows_may_be_of_any_number_where_that_was_asked_for() -> None:
    calls: list[torch.fx.GraphModule] = []
    doubled = graphs_of(lambda x: x * 2, backend_calls=calls)
    for n in (3, 5, 7):
        rows = torch.ones(n, 2)
        any_number_of_rows(rows)
        assert torch.equal(doubled(rows), rows * 2)
    assert len(calls) == 1


@pytest.mark.parametrize(("apart", "n_graphs"), [(True, 1), (False, 2)])
def test_sizes_that_happen_to_be_equal_are_taken_for_one_unless_kept_apart(apart: bool, n_graphs: int) -> None:
    """So the setting is still read, and is still needed."""
    calls: list[torch.fx.GraphModule] = []
    added = graphs_of(lambda x, y: x.sum() + y.sum(), backend_calls=calls, dynamic=True)

    def run(n: int, m: int) -> None:
        assert added(torch.ones(n), torch.ones(m)).item() == n + m

    if apart:
        with equal_sizes_kept_apart():
            run(4, 4)
    else:
        run(4, 4)
    run(5, 6)
    assert len(calls) == n_graphs


# ------------------------------------------------------------------------------------------------------- elsewhere


def test_no_other_module_of_the_compute_plane_uses_private_names_of_libraries() -> None:
    private = re.compile(r"(?<!\bself)(?<!\bcls)(?<!\))\._(?!exit\(|asdict\(|_)[a-z]\w*|import_module\(")
    root = Path(kd_assets.__file__).parent
    sources = [path for plane in ("teacher", "sources", "student", "demo") for path in (root / plane).rglob("*.py")]
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if private.search(line)
    ]
    assert sources
    assert found == []
