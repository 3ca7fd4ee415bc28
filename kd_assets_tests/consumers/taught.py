"""One tiny teacher with caches of a few documents, which every consumer's own code reads an export of.

What it says of a document is captured here, by hooks and a plain `log_softmax` with `topk`: nothing of it comes from
what captures for the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets.export.exporting import export_recipe
from kd_assets.export.format import ExportOptions
from kd_assets.store.schema import HiddenState
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth

VOCABULARY, HIDDEN_SIZE, N_BLOCKS = 200, 32, 8
AUXILIARY = (1, 3, 4)
LAST = N_BLOCKS - 1
MAX_LENGTH = 64
LENGTHS = (40, 23, 31, 12)
ABOUT_ZERO = 0.001
"""Of a loss in nats: what rounding states to bfloat16, or log-probabilities to float16, may cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taught:
    teacher: Any
    folder: Path
    store: Path

    def exported(self, name: str, to: Path, **options: Any) -> Path:
        export_recipe(name, self.store / made_up.RECIPE, to, options=ExportOptions(**options))
        return to

    @torch.no_grad()
    def blocks(self, input_ids_BT: Tensor) -> Tensor:
        """Float [B, T, 3H]: the outputs of the auxiliary blocks in a forward pass of its own."""
        states = self.teacher(input_ids=input_ids_BT, output_hidden_states=True).hidden_states
        return torch.cat([states[block + 1] for block in AUXILIARY], dim=-1).float()

    @torch.no_grad()
    def logits(self, input_ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.teacher(input_ids=input_ids_BT).logits
        return logits_BTV.float()


def make_taught(folder: Path, monkeypatch: pytest.MonkeyPatch, *, k: int = VOCABULARY) -> Taught:
    """A teacher in shards with an index, as SpecForge's head wants it, and caches of its own greedy continuations."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "teacher", max_shard_size="20KB")
    teacher = model.float().eval()
    states: tuple[HiddenState, ...] = (*AUXILIARY, LAST, "before_norm", "after_norm")
    monkeypatch.setattr(made_up, "STATES", states)
    documents = [document_of(teacher, i, length, k) for i, length in enumerate(LENGTHS)]
    made_up.commit(
        folder / "store",
        documents,
        assets=("shards_manifest", "hidden_state_cache", "topk_cache"),
        facts={"vocab_size": VOCABULARY},
        provenance={"teacher_folder": str(folder / "teacher")},
    )
    return Taught(teacher=teacher, folder=folder / "teacher", store=folder / "store")


@torch.no_grad()
def document_of(teacher: Any, seed: int, length: int, k: int) -> Truth:
    """Five random tokens and, learned, what the teacher finds most probable after them; with all that it says of it."""
    ids = torch.randint(3, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(seed))
    while ids.shape[1] < length:
        ids = torch.cat([ids, teacher(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    outputs: dict[HiddenState, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, n=n: outputs.__setitem__(n, out[0] if len(out) == 1 else out))
        for n, block in enumerate(teacher.model.layers)
    ]
    norm_hook = teacher.model.norm.register_forward_hook(
        lambda _m, given, out: outputs.update({"before_norm": given[0][0], "after_norm": out[0]})
    )
    logits_MV = teacher(input_ids=ids).logits[0, :-1].float()
    for hook in (*hooks, norm_hook):
        hook.remove()
    bits = {name: state.reshape(length, -1).bfloat16().view(torch.int16) for name, state in outputs.items()}
    logprobs_MV = logits_MV.log_softmax(-1)
    top = logprobs_MV.topk(k, -1)
    return Truth(
        partition_key="made-up-00000",
        document_id=f"d{seed}",
        ids_L=ids[0].numpy().astype(np.uint32),
        mask_L=np.arange(length) >= 5,
        topk_ids_Mk=top.indices.numpy().astype(np.uint32),
        topk_logprobs_Mk=top.values.numpy().astype(np.float16),
        logsumexp_M=logits_MV.logsumexp(-1).numpy(),
        target_logprob_M=logprobs_MV.gather(1, ids[0, 1:, None])[:, 0].numpy(),
        bits_LH={name: found.numpy().view(np.uint16) for name, found in bits.items()},
        embeddings_2H=np.zeros((2, 1), dtype=np.float32),
        topk_positions=np.zeros(0, dtype=np.uint32),
        state_positions=np.zeros(0, dtype=np.uint32),
    )


def require_about_equal(found_BTH: Tensor, expected_BTH: Tensor, mask_BT: Tensor) -> None:
    """To bfloat16's precision, where there are tokens; and one row off they are not."""
    there = mask_BT.bool()
    found, expected = found_BTH.float(), expected_BTH
    assert torch.allclose(found[there], expected[there], rtol=0.01, atol=0.01)
    assert not torch.allclose(found[:, 1:][there[:, 1:]], expected[:, :-1][there[:, 1:]], rtol=0.01, atol=0.01)


def table_row(name: str, reader: str, as_student: float, shifted: float) -> None:
    print(f"\n| {name} | {reader} {version(reader)} | {as_student:.6f} | {shifted:.4f} |")
