"""What a data set's card on the Hugging Face hub has at its head: https://huggingface.co/docs/hub/datasets-cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kd_assets.errors import printable

_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "odc-by", "odbl", "pddl", "gpl-3.0", "lgpl-3.0", "unlicense"),
)
"""Those names of the hub for licences that are SPDX's in lower case."""


def licences_of(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """The licences of these sources, each once, in their order."""
    return sorted({licence for raw in sources if (licence := licence_in_words(raw)) is not None})


def front_matter(
    sources: Sequence[Mapping[str, Any]],
    *,
    n_documents: int,
    configs: Mapping[str, str | Sequence[str]],
    pretty_name: str | None = None,
    viewer: bool = True,
) -> list[str]:
    """Its lines. `configs`: name → pattern of the files, or several; each is a data set of its own with one split.
    `viewer`: whether the hub is to show rows."""
    licences = licences_of(sources)
    known = len(licences) == 1 and licences[0].lower() in _HUB_LICENCES
    lines = ["---", f"license: {licences[0].lower() if known else 'other'}"]
    if not known:
        lines.append(f"license_name: {_yaml(', '.join(licences) or 'not stated by the sources')}")
    if pretty_name is not None:
        lines.append(f"pretty_name: {_yaml(pretty_name)}")
    lines += ["tags:", "- knowledge-distillation", "- teacher-cache", "size_categories:", f"- {_size(n_documents)}"]
    if not viewer:
        lines.append("viewer: false")
    if configs:
        lines.append("configs:")
    for name, patterns in configs.items():
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train"]
        if isinstance(patterns, str):
            lines.append(f"    path: {patterns}")
        else:
            lines += ["    path:", *(f"    - {_yaml(pattern)}" for pattern in patterns)]
    return [*lines, "---"]


def _yaml(text: str) -> str:
    """In double quotes, where YAML has JSON's escapes but for those of pairs of surrogates: text that would need them
    stands as it is."""
    shown = printable(text)
    return json.dumps(shown, ensure_ascii=max(shown, default="") <= "\uffff")


def _size(n_documents: int) -> str:
    limits = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((label for limit, label in limits.items() if n_documents < limit), "n>1M")


def source_line(raw: Mapping[str, Any]) -> str:
    """A source as an item of a list: name, licence, revision."""
    licence = licence_in_words(raw) or "no licence stated"
    revision = f", revision {_plain(raw['revision'])}" if raw.get("revision") else ""
    return f"- {_plain(raw.get('name'))}: {_plain(licence)}{revision}"


def licence_in_words(raw: Mapping[str, Any]) -> str | None:
    """A source's licence, and beside one that is not known why it was accepted all the same; None: neither is said."""
    licence, accepted = raw.get("licence"), raw.get("licence_accepted")
    if not accepted or (licence and str(licence).strip().casefold() != "unknown"):
        return str(licence) if licence else None
    return f"{licence} (accepted: {accepted})" if licence else str(accepted)


def _plain(value: object) -> str:
    """Text in a line of Markdown; what would be markup there is escaped, and nothing else."""
    escaped = re.sub(r"[\\`*<>\[\]]", r"\\\g<0>", printable(str(value)))
    return re.sub(r"^(?=[#+-]+\s)", r"\\", escaped)
