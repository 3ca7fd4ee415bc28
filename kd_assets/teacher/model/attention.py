"""The fastest exact attention: flash-attn's own kernels where they are installed and proved equal, else SDPA's.

Used by `kd_assets.teacher.model.load` only. The invariant: kernels are used that gave the same logits as those that
transformers chose, on the loaded weights; whatever goes wrong with others costs speed and a warning, no more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from kd_assets.teacher.model.anatomy import CAUSAL_RTOL, probe_ids
from kd_assets.teacher.model.head import relative_difference
from kd_assets.teacher.model.quantised import Quantisation, tolerance

FLASH = "flash_attention_2"


def can_flash(model: Any, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether flash-attn's own kernels can be tried: installed (transformers would fetch them from the network
    otherwise), for these numbers, and not replaced by others for this architecture."""
    allowed = getattr(model, "_compatible_flash_implementations", None)
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and importlib.util.find_spec("flash_attn") is not None
        and getattr(model, "_supports_flash_attn", False)
        and (not allowed or FLASH in allowed)
    )


@torch.inference_mode()
def switch_attention(
    model: Any,
    implementation: str,
    *,
    device: torch.device,
    warn: Callable[[str], None],
    quantisation: Quantisation | None = None,
) -> None:
    """Use these attention kernels if they give the probe's logits as those in use do; else warn and leave the model."""
    before = model.config._attn_implementation
    ids_BT = probe_ids(model.get_input_embeddings().weight.shape[0]).to(device)
    plain_BTV = model(input_ids=ids_BT, use_cache=False).logits
    try:
        model.set_attn_implementation(implementation)
        difference = relative_difference(model(input_ids=ids_BT, use_cache=False).logits.float(), plain_BTV.float())
        if difference <= tolerance(CAUSAL_RTOL[plain_BTV.dtype], quantisation):
            return
        reason = f"its logits differ by {difference:.2g} of the largest"
    except torch.OutOfMemoryError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as e:  # a package built for another torch or GPU
        reason = f"{type(e).__name__}: {e}"
    model.set_attn_implementation(before)
    warn(f"attention by {before}, since {implementation} is no use to {type(model).__name__} here ({reason})")
