"""The plain way to compute the caches, and the check of what was stored against it.

Used by `kd_assets.teacher` and by tests. One document at a time, no batch, no padding, no chunks: all float32 logits,
`log_softmax` + `topk`, transformers' own `output_hidden_states`. It shares with the pass the loaded model and nothing
else, and it is compared with what is read back from the written parts: the cache is checked, not the pass.

Names: L = tokens of a document, H = hidden size, V = vocabulary, k as in top-k.

Tolerances have two terms. Storing rounds: float16 log-probabilities by 2^-11 of their size, bfloat16 states by 2^-8.
Computing in another batch shape rounds differently, by a multiple of the precision of the teacher: relative to the
largest logit for log-probabilities, to a state's norm for states. A larger difference is recorded as `passed: false`
and the result is committed nevertheless: the check in the control plane then fails in everyone's sight with its
numbers, while the data stays there to be looked at; a task that refused to commit would only be started again, with
the same outcome.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_assets.contract import Asset
from kd_assets.errors import TeacherError
from kd_assets.store.encode import flat
from kd_assets.store.partfile import PartFile
from kd_assets.store.schema import hidden_field
from kd_assets.teacher.load import Teacher, tapped

FLOAT16_RTOL = 2.0**-11
FLOAT16_ATOL = 2.0**-25
"""Half the smallest float16: a log-probability of a near-certain token is that close to 0."""
BFLOAT16_RTOL = 2.0**-8

LOGIT_RTOL = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""What another batch shape may change in a logit, relative to the row's largest: eight roundings of the teacher's
precision in 16 bits (2^-8, 2^-11), and 512 in float32, where thousands of terms are summed in another order."""
STATE_RTOL = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""The same for a hidden state, as the norm of the difference over the norm: noise that grows with every block."""

Row = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A document as the plain path gives it. Final states and all logits; float32."""

    logits_LV: Tensor
    block_LH: dict[int, Tensor]
    final_LH: Tensor


@torch.inference_mode()
def reference(teacher: Teacher, input_ids_L: npt.NDArray[np.uint32], blocks: Sequence[int]) -> Reference:
    """Run one document through the whole model, keeping everything.

    Block n's output is `hidden_states[n + 1]`, except for the last block: there transformers puts the state after the
    final norm, so its own output is taken by a hook.
    """
    ids_1L = torch.from_numpy(input_ids_L.astype(np.int64)).unsqueeze(0).to(teacher.device)
    last_block = teacher.blocks[-1]
    with tapped((last_block,)) as outputs:
        output = teacher.model(input_ids=ids_1L, use_cache=False, output_hidden_states=True)
    n_blocks = len(teacher.blocks)
    if output.hidden_states is None or len(output.hidden_states) != n_blocks + 1:
        raise TeacherError(f"{type(teacher.model).__name__} does not give the hidden states of its {n_blocks} blocks")
    states = [*output.hidden_states[1:-1], outputs[last_block]]
    return Reference(
        logits_LV=output.logits[0].float(),
        block_LH={n: states[n][0].float() for n in blocks},
        final_LH=output.hidden_states[-1][0].float(),
    )


def sampled_documents(n_documents: int, n_sampled: int, *, seed: int, partition_key: str) -> list[int]:
    """Indexes of the documents to recompute: the same for every attempt, others for every partition."""
    choice = random.Random(f"{seed}:{partition_key}")  # noqa: S311 - a sample, no secret
    return sorted(choice.sample(range(n_documents), min(n_sampled, n_documents)))


def stored_row(path: Path, row: int) -> Row:
    """Row `row` of a part file as arrays: what a reader of the cache would get."""
    with PartFile(path) as part:
        group = part.group_of(row)
        columns = [name for name in part.schema.names if name not in ("document_id", "n_tokens")]
        table = part.read_group(group, columns).slice(row - int(part.first_rows[group]), 1)
        return {name: flat(table[name]) for name in columns}


@dataclass(kw_only=True, slots=True)
class Comparison:
    """The largest differences found in one cache, and how close the worst came to its tolerance."""

    asset: Asset
    dtype: torch.dtype
    largest: dict[str, float] = field(default_factory=dict)
    """Name of a difference → its largest value."""
    worst: float = 0.0
    """Largest difference over its tolerance: above 1 the check has failed. NaN counts as infinite."""

    def add(self, row: Row, expected: Reference) -> None:
        """Compare one stored document with its reference (of at least as many tokens)."""
        match self.asset:
            case "topk_cache":
                self._add_topk(row, expected)
            case "hidden_state_cache":
                self._add_hidden_states(row, expected)
            case "embedding_cache":
                self._add_embeddings(row, expected)

    def result(self, document_ids: Iterable[str], *, seed: int) -> dict[str, Any]:
        """What the manifest keeps as `checks["recomputed"]`."""
        documents = list(document_ids)
        return {
            "passed": self.worst <= 1.0,
            "n_documents": len(documents),
            "document_ids": documents,
            "seed": seed,
            "worst_over_tolerance": self.worst,
            **self.largest,
        }

    def _add_topk(self, row: Row, expected: Reference) -> None:
        """Values at the stored ids, and the k largest values whatever their ids: equal ones may swap places."""
        n_positions = len(row["input_ids"]) - 1
        if n_positions == 0:
            return
        logits_LV = expected.logits_LV[:n_positions]
        logprobs_LV = torch.log_softmax(logits_LV, dim=-1)
        device = logits_LV.device
        ids_Lk = torch.from_numpy(row["topk_ids"].astype(np.int64)).view(n_positions, -1).to(device)
        stored_Lk = torch.from_numpy(row["topk_logprobs"].astype(np.float32)).view(n_positions, -1).to(device)
        targets_L = torch.from_numpy(row["input_ids"][1:].astype(np.int64)).to(device)
        computing_L1 = LOGIT_RTOL[self.dtype] * logits_LV.abs().amax(dim=1, keepdim=True)

        at_ids_Lk = logprobs_LV.gather(1, ids_Lk)
        largest_Lk = logprobs_LV.topk(ids_Lk.shape[1], dim=1).values
        for plain_Lk in (at_ids_Lk, largest_Lk):
            tolerance_Lk = computing_L1 + FLOAT16_RTOL * plain_Lk.abs() + FLOAT16_ATOL
            self._note("max_abs_logprob_difference", (stored_Lk - plain_Lk).abs(), tolerance_Lk)
        self._note(
            "max_abs_logsumexp_difference",
            (_on(row["logsumexp"], device) - logits_LV.logsumexp(dim=1)).abs(),
            computing_L1.squeeze(1),
        )
        self._note(
            "max_abs_target_logprob_difference",
            (_on(row["target_logprob"], device) - logprobs_LV.gather(1, targets_L.unsqueeze(1)).squeeze(1)).abs(),
            2 * computing_L1.squeeze(1),
        )
        n_repeated = int((ids_Lk.sort(dim=1).values.diff(dim=1) == 0).sum())
        self._note("n_repeated_topk_ids", torch.tensor([float(n_repeated)]), torch.tensor([0.5]))

    def _add_hidden_states(self, row: Row, expected: Reference) -> None:
        n_tokens = len(row["input_ids"])
        tolerance = BFLOAT16_RTOL + STATE_RTOL[self.dtype]
        for block, plain_LH in expected.block_LH.items():
            bits = torch.from_numpy(row[hidden_field(block)].view(np.int16).copy())
            stored_LH = bits.view(torch.bfloat16).view(n_tokens, -1).to(plain_LH.device).float()
            self._add_states("hidden", stored_LH, plain_LH[:n_tokens], tolerance)

    def _add_embeddings(self, row: Row, expected: Reference) -> None:
        final_LH = expected.final_LH[: len(row["input_ids"])]
        plain = torch.stack([final_LH.double().mean(dim=0).float(), final_LH[-1]])
        stored = np.stack([row["mean_embedding"], row["last_token_embedding"]])
        self._add_states("embedding", _on(stored, plain.device), plain, STATE_RTOL[self.dtype])

    def _add_states(self, name: str, stored_LH: Tensor, plain_LH: Tensor, tolerance: float) -> None:
        delta_LH = stored_LH - plain_LH
        self._keep(f"max_abs_{name}_difference", delta_LH.abs().max())
        relative_L = delta_LH.norm(dim=1) / plain_LH.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        self._note(f"max_relative_{name}_difference", relative_L, torch.full_like(relative_L, tolerance))

    def _note(self, name: str, delta: Tensor, tolerance: Tensor) -> None:
        self._keep(name, delta.max())
        worst = float((delta / tolerance).nan_to_num(nan=float("inf")).max())
        self.worst = max(self.worst, worst)

    def _keep(self, name: str, value: Tensor) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), float(value.nan_to_num(nan=float("inf"))))


def _on(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)
