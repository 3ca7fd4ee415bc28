"""Weights in a teacher's files that its model has no place for: known to be harmless, or refused.

Used by `kd_assets.teacher` only. transformers drops such weights with a line in its log, and what then runs is another
model: one without the biases that its configuration forgot, or without its last layer. The invariant: a weight that is
not used is of a kind that a next-token distribution does not need, and each kind is counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.errors import TeacherError
from kd_assets.model_files.safetensors_file import StoredTensor, stored_tensors

OTHER = "ignored by the architecture"
"""Names that the model's class in transformers lists itself as nothing to it."""

_KINDS = {
    "multi-token prediction": re.compile(r"(^|\.)mtp[._]"),
    "rotary buffers": re.compile(
        r"(^|\.)(rotary_emb|rotary_pos_emb|rotary_embedding|rope)\."
        r"(inv_freq|original_inv_freq|cos_cached|sin_cached|cos|sin)$"
    ),
    "position ids": re.compile(r"(^|\.)position_ids$"),
    "other modalities": re.compile(
        r"^(model\.)?(vision_tower|vision_model|visual|vision_encoder|vision_embed_tokens|vision_adapter|"
        r"vision_language_adapter|vit|image_newline|img_processor|multi_modal_projector|mm_projector|patch_merger|"
        r"pre_mm_projector_norm|embed_vision|audio_tower|audio_model|audio_encoder|audio_projector|embed_audio|"
        r"talker|token2wav|code2wav)(\.|$)"
    ),
    "scales of a quantised key-value cache": re.compile(
        r"(^|\.)(self_attn|attn|attention)\.([kqv]|kv|[kqv]_proj|kv_proj|qkv_proj)[._](k_|v_|q_|kv_|output_)?scale$"
        r"|\.[kv]_cache_scale$"
    ),
    "value head": re.compile(r"^v_head\."),
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")
_OF_A_PREDICTION_LAYER = ("eh_proj.", "embed_proj.")
"""What joins a token's embedding to the state before it: no decoder block has it."""


def stored_weights(files: Sequence[Path]) -> dict[str, tuple[Path, StoredTensor]]:
    """Every tensor of these files by its name. Raises TeacherError where two files have one of the same name."""
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for path in files:
        for tensor in stored_tensors(path):
            if tensor.name in found:
                raise TeacherError(
                    f"{path} and {found[tensor.name][0]} both hold {tensor.name}: which one counts is left to chance; "
                    "download the model again, or save it anew into an empty folder"
                )
            found[tensor.name] = path, tensor
    return found


def harmless_unused(
    unexpected: Collection[str],
    ignored: Collection[str],
    stored: Mapping[str, tuple[Path, StoredTensor]],
    config: Any,
    *,
    folder: Path,
) -> dict[str, int]:
    """Kind → number of weights that the model has no place for, all of them harmless. Raises TeacherError for others.

    `ignored`: those of `unexpected` that the model's own class says are nothing to it; `config`: of the text model.
    """
    kinds: Counter[str] = Counter()
    unknown = []
    prediction_layers = _prediction_layers(unexpected, config)
    for name in sorted(unexpected):
        kind = _kind(name, prediction_layers, stored)
        if kind is None and name not in ignored:
            unknown.append(name)
        kinds[kind or OTHER] += 1
    if unknown:
        more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
        raise TeacherError(
            f"{folder}: the model that config.json describes has no place for {len(unknown):,} of the weights in its "
            f"files ({', '.join(unknown[:3])}{more}), and would run without them: correct config.json (is there "
            "attention_bias for biases, num_hidden_layers for layers, architectures?), or download it again"
        )
    return dict(sorted(kinds.items()))


def _kind(name: str, prediction_layers: Collection[int], stored: Mapping[str, tuple[Path, StoredTensor]]) -> str | None:
    for kind, pattern in _KINDS.items():
        if pattern.search(name):
            return kind
    if (layer := _LAYER.search(name)) and int(layer[1]) in prediction_layers:
        return "multi-token prediction"
    if name not in stored:
        return None
    path, tensor = stored[name]
    if _MASK.search(name) and _is_mask(tensor.shape):
        return "attention masks"
    if name.endswith(".bias") and len(tensor.shape) == 1 and is_zero(path, name):
        return "biases of zero"
    return None


def _prediction_layers(unexpected: Collection[str], config: Any) -> set[int]:
    """Layers after the last one that predict further tokens (DeepSeek-V3, section 2.2), which is proved by what they
    are made of: a configuration that counts one layer too few looks the same by numbers."""
    n_blocks = getattr(config, "num_hidden_layers", None)
    n_more = getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(n_blocks, int) or not isinstance(n_more, int):
        return set()
    joined = {
        int(layer[1])
        for name in unexpected
        if (layer := _LAYER.search(name)) and any(part in name for part in _OF_A_PREDICTION_LAYER)
    }
    return joined & set(range(n_blocks, n_blocks + min(n_more, len(joined))))


def _is_mask(shape: Sequence[int]) -> bool:
    """[1, 1, n, n], or the one number that masked places get: no bias of a layer has this shape."""
    return math.prod(shape) == 1 or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def is_zero(path: Path, name: str) -> bool:
    """Whether a tensor of a file holds nothing but zeros: added, it changes nothing (AutoGPTQ writes such biases)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return not bool(file.get_tensor(name).any())
