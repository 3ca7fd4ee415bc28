"""A tokenizer that is trained on the spot, with a chat template with and without generation marks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kd_assets.sources.records import Record

CORPUS = [
    "The import statement finds a module, loads it and binds a name in the local namespace.",
    "user\nWhat is a list?\nassistant\nA list is a mutable sequence.",
    "for i in range(10):\n    print(i, 'hello world')",
]
SPECIAL = ["<|bos|>", "<|eot|>", "<|start|>"]

MARKED_TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|eot|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|eot|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
UNMARKED_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

SaveTokenizer = Callable[..., Path]


@pytest.fixture(scope="session")
def save_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SaveTokenizer:
    """Writes a tokenizer folder; each combination of arguments once."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved: dict[tuple[Any, ...], Path] = {}

    def save(template: str | None = MARKED_TEMPLATE, *, adds_bos: bool = False) -> Path:
        if (template, adds_bos) not in saved:
            tokenizer.post_processor = (
                processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
                if adds_bos
                else processors.ByteLevel(trim_offsets=True)
            )
            fast = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eot|>", chat_template=template
            )
            folder = tmp_path_factory.mktemp("tokenizer")
            fast.save_pretrained(folder)
            saved[template, adds_bos] = folder
        return saved[template, adds_bos]

    return save


def text_record(text: str, number: int = 0) -> Record:
    return Record(where=f"web.jsonl:{number + 1}", source="web", number=number, document_id=f"d{number}", text=text)


def chat_record(*turns: tuple[str, str], number: int = 0) -> Record:
    return Record(
        where=f"web.jsonl:{number + 1}",
        source="web",
        number=number,
        document_id=f"d{number}",
        messages=tuple({"role": role, "content": content} for role, content in turns),
    )
