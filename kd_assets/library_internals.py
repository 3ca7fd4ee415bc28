"""The few names of torch, transformers and accelerate that they do not promise, in one place, tested by what they do.

Only `kd_assets.teacher` may import it, and `kd_assets.sources` for chat templates; it imports a library when it is
asked for something of it. `kd_assets_tests/test_library_internals.py` fails when a new version changes any of these.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------- transformers


def attention_of(model: Any) -> str:
    """The attention kernels that a model of transformers uses: `sdpa`, `eager`, ..."""
    return str(model.config._attn_implementation)


def encoder_of(tokenizer: Any) -> Any | None:
    """The `tokenizers.Tokenizer` whose batch call is all that the tokenizer's own call does with texts; None of a class
    that does it another way (slow ones, and such as add to the texts or to the tokens)."""
    from transformers import PreTrainedTokenizerFast

    steps = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding", "backend_tokenizer")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if any(getattr(type(tokenizer), step) is not getattr(PreTrainedTokenizerFast, step) for step in steps):
        return None
    return tokenizer.backend_tokenizer


def class_that_loads(auto_class: Any, config: Any) -> type | None:
    """The class that an Auto class of transformers makes for this configuration; None where it does not know it."""
    found: type | None = auto_class._model_mapping.get(type(config), None)
    return found


@dataclass(kw_only=True, slots=True)
class LoadingReport:
    """What transformers finds of a model's weights that do not fit, before it leaves out what a class ignores."""

    unexpected: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    """Those of `unexpected` that the model's class ignores."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Name → its shapes in the file and in the model."""


@contextlib.contextmanager
def whole_loading_report() -> Iterator[LoadingReport]:
    """What `from_pretrained` reports of the one model that the body loads, with what it keeps to itself."""
    from transformers import PreTrainedModel

    name = "_adjust_missing_and_unexpected_keys"
    adjust = getattr(PreTrainedModel, name)
    report = LoadingReport()

    def keep(model: Any, info: Any) -> None:
        report.unexpected = set(info.unexpected_keys)
        report.mismatched = {key: (tuple(stored), tuple(own)) for key, stored, own in info.mismatched_keys}
        adjust(model, info)
        report.ignored = report.unexpected - set(info.unexpected_keys)

    setattr(PreTrainedModel, name, keep)
    try:
        yield report
    finally:
        setattr(PreTrainedModel, name, adjust)


def chat_environment() -> Any:
    """A Jinja environment of its own, as transformers has it for chat templates: sandboxed, with its filters, functions
    and `{% generation %}`."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._cached_compile_jinja_template("").environment


@contextlib.contextmanager
def no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Take off the hooks that transformers leaves on every layer once it was asked for hidden states: each would be
    called in every later pass, and breaks the graph of a compiled block."""
    installed = "_output_capturing_hooks_installed"  # transformers.utils.output_capturing
    before = [(module, set(module._forward_hooks), hasattr(module, installed)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, was_installed in before:
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            if not was_installed:
                module.__dict__.pop(installed, None)


# ------------------------------------------------------------------------------------------------ torch, accelerate


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called around the module's `forward`: torch's hooks, or accelerate's, which moves layers."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def has_compiler_settings(names: Sequence[str]) -> bool:
    """Whether `torch.compile` can be given these options: they are settings of inductor."""
    from torch._inductor import config

    return all(hasattr(config, name) for name in names)


def any_number_of_rows(tensor: Tensor) -> None:
    """Have the compiler make code in which the tensor's first dimension may have any size."""
    import torch

    torch._dynamo.mark_dynamic(tensor, 0)


@contextlib.contextmanager
def equal_sizes_kept_apart() -> Iterator[None]:
    """While the body compiles: sizes that only happen to be equal (as many documents as heads, say) are not taken for
    one."""
    symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
    with symbolic_shapes.patch(use_duck_shape=False):
        yield
