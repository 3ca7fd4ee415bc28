"""The card of an `hf` export: what the hub and a reader are to know of the data set, from the caches' provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from kd_assets.cards.front_matter import front_matter, source_line
from kd_assets.export.format import ExportOptions, Source
from kd_assets.export.identity import options_as_json
from kd_assets.store import fingerprint
from kd_assets.store.schema import BLOCK_CONVENTION, FINAL_CONVENTIONS, hidden_state_of

CARD_NAME = "README.md"

_MEANINGS = {
    "partition_key": "the shard of the recipe that the document is in",
    "document_id": "the document's id",
    "input_ids": "token ids [L]",
    "loss_mask": "which tokens a student learns to predict [L]; not shifted",
    "topk_ids": "the most probable next tokens of each position, most probable first [M, k]",
    "topk_logprobs": "their natural log-probabilities at temperature 1 [M, k]; row i is about token i + 1",
    "logsumexp": "of the logits [M]: a log-probability plus this is the logit",
    "target_logprob": "the log-probability of the token that follows [M]",
    "outside_mass": "the teacher's probability of all ids that the student's vocabulary lacks, which nothing else here "
    "is about [M]",
    "sampled_ids": "ids drawn from the whole distribution: those of row i from sampled_offsets[i] on",
    "sampled_counts": "how often each was drawn",
    "sampled_offsets": "where the draws of each row begin [M + 1]",
    "topk_positions": "the position of each row of the predictions [M]",
    "hidden_positions": "the position of each row of the states [N]",
    "mean_embedding": "the mean of the final hidden states over all tokens that its cache has [H]",
    "last_token_embedding": "the final hidden state of the last token that its cache has [H]",
}


def dataset_card(source: Source, schema: pa.Schema, options: ExportOptions, *, n_documents: int, n_tokens: int) -> str:
    """The text of the card. Equal caches and options give an equal one."""
    states = [name for name in schema.names if hidden_state_of(name) is not None]
    return "\n".join(
        [
            *_front_matter(source, n_documents, _config_name(source, options)),
            "",
            f"# Teacher caches of {source.recipe}",
            "",
            f"{n_documents:,} documents, {n_tokens:,} tokens, with what a teacher says of each: knowledge distillation",
            f"without the teacher at hand. Teacher: `{_teacher(source)}`. Made by kd_assets; `export.json` has the",
            "files' hashes and the versions of the caches.",
            "",
            "## Columns",
            "",
            "L tokens of a document, M = its predictions, N = its states, H = the teacher's hidden size.",
            "",
            "| column | type | what it is |",
            "|---|---|---|",
            *(f"| `{field.name}` | {_type(field, source)} | {meaning_of(field.name)} |" for field in schema),
            "",
            *_how_to_load(source, states),
            "",
            "## Sources",
            "",
            *(source_line(raw) for raw in _sources(source)),
            "",
        ]
    )


def _config_name(source: Source, options: ExportOptions) -> str:
    """A name that tells the content: for a folder with an equal name, whose card has an equal configuration, `datasets`
    (5.2.0) takes what it has in its cache, whatever files are there now."""
    versions = {asset: [m.data_version for m in of_asset] for asset, of_asset in source.manifests.items()}
    return f"export-{fingerprint({'caches': versions, 'options': options_as_json(options)})[:16]}"


def _front_matter(source: Source, n_documents: int, config_name: str) -> list[str]:
    return front_matter(_sources(source), n_documents=n_documents, configs={config_name: "data/part-*.parquet"})


def _how_to_load(source: Source, states: list[str]) -> list[str]:
    load = "rows = datasets.load_dataset(FOLDER, split='train')"
    lines = ["## How to load", "", "```python", "import datasets", "", load]
    if states:
        lines += [
            "# States are the bits of bfloat16:",
            "import torch",
            "",
            f"states = torch.frombuffer(bytearray(rows[0]['{states[0]}']), dtype=torch.bfloat16)"
            f".view(-1, {source.hidden_size})",
        ]
    return [*lines, "```"]


def _type(field: pa.Field, source: Source) -> str:
    if hidden_state_of(field.name) is not None:
        return f"bytes: bfloat16 [N, {source.hidden_size}]"
    kind, dimensions = field.type, ""
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        dimensions += f"[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else "[]"
        kind = kind.value_type
    return f"{kind}{dimensions}"


def meaning_of(name: str) -> str:
    """What a field of the caches is, by its name."""
    state = hidden_state_of(name)
    if isinstance(state, int):
        return BLOCK_CONVENTION.replace("<block>", str(state)).replace("|", "/")
    if state is not None:
        return FINAL_CONVENTIONS[state]
    return _MEANINGS.get(name, "as in the cache")


def _teacher(source: Source) -> str:
    revision = source.provenance.get("teacher_revision")
    return f"{source.provenance.get('teacher', 'unknown')}{f' at {revision}' if revision else ''}"


def _sources(source: Source) -> list[Mapping[str, Any]]:
    found = source.provenance.get("sources")
    return [raw for raw in found if isinstance(raw, dict)] if isinstance(found, list) else []
