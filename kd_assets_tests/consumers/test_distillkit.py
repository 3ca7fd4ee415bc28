"""The `distillkit` export by DistillKit's reader written anew, and its loss: it is not on the package index.

Its own code (commit a61c2e7) read the same export of the same kind of teacher by hand, with the loss of this test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd_assets_tests.consumers.taught import ABOUT_ZERO, LENGTHS, VOCABULARY, make_taught
from kd_assets_tests.export.distillkit_reader import read_config, read_position
from kd_assets_tests.export.saved_rows import saved_rows

PACK_TO = 56


@pytest.mark.parametrize("k", [VOCABULARY, 16])
def test_distillkits_loss_of_the_teacher_as_student_is_about_zero_in_packed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    taught = make_taught(tmp_path, monkeypatch, k=k)
    out = taught.exported("distillkit", tmp_path / "out", pack_to=PACK_TO)
    config, rows = read_config(out / "compression_config.yaml"), saved_rows(out)
    ids_RT, numbers_RT = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask"))
    assert int((numbers_RT > 0).sum()) == sum(length - 1 for length in LENGTHS)
    assert int(numbers_RT.max()) > 1, "some rows hold several documents"

    logits_RTV = torch.zeros(*ids_RT.shape, VOCABULARY)
    for r, numbers in enumerate(numbers_RT):
        for number in range(1, int(numbers.max()) + 1):  # by itself each, as the packing patch has attention
            at = (numbers == number).nonzero()[:, 0]
            logits_RTV[r, at] = taught.logits(ids_RT[r, at][None])[0]

    def loss_of(student_RTV: Tensor) -> float:
        """Their sparse KL divergence (symmetric_uniform: the rest is one outcome), the mean where there is a label."""
        total, n = 0.0, 0
        for r, row in enumerate(rows):
            for t in (t for t in range(PACK_TO) if row["labels"][t] >= 0):
                ids, logprobs = read_position(row["compressed_logprobs"][t], row["bytepacked_indices"][t], config)
                log_p = torch.tensor(logprobs, dtype=torch.float64)
                log_q = student_RTV[r, t].double().log_softmax(-1)[ids]
                rest_p, rest_q = ((1 - log.exp().sum()).clamp(1e-8, 1 - 1e-8) for log in (log_p, log_q))
                kept = (log_p.exp() * (log_p - log_q)).sum()
                total, n = total + float(kept + rest_p * (rest_p.log() - rest_q.log())), n + 1
        return total / n

    student, late, early = (loss_of(logits_RTV.roll(by, 1)) for by in (0, 1, -1))
    what = f"distillkit (packed, k = {'vocabulary' if k == VOCABULARY else k})"
    print(f"\n| {what} | reader written anew | {student:.6f} | {min(late, early):.4f} |")
    assert abs(student) < ABOUT_ZERO
    assert min(late, early) > 100 * max(abs(student), 1e-3)
