"""The `speculators` export by speculators' own code: its reader, check, collator, draft model and loss.

The student is the teacher: its logits come from a forward pass of its own, and their loss compares them with what their
model makes of the exported state, with the norm and head that it loads from the teacher's folder.

Runs where `speculators` 0.9.0 and `hs-connectors` are installed, with openai, distro, jiter and loguru of its
requirements.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kd_assets_tests.consumers.taught import (
    ABOUT_ZERO,
    HIDDEN_SIZE,
    LENGTHS,
    VOCABULARY,
    Taught,
    require_about_equal,
    table_row,
)

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of what the consumers' own code warns of: it is not this project's to mend."""

IN_A_BATCH = 128
"""Tokens: all documents, and padding."""


@pytest.mark.parametrize("draft_vocabulary", [None, 50])
def test_speculators_reads_its_export_and_its_loss_of_the_teacher_as_student_is_about_zero(
    taught: Taught, tmp_path: Path, draft_vocabulary: int | None
) -> None:
    pytest.importorskip("speculators")
    from speculators.data_generation.offline import check_hidden_states, find_corrupt_hidden_state_indices
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.models.eagle3.data import shift_batch
    from speculators.models.eagle3.metrics import compute_metrics
    from speculators.train.cli import parse_vocab_mappings
    from speculators.train.data import ArrowDataset, CollateFn
    from transformers import AutoConfig

    out = taught.exported("speculators", tmp_path / "out", draft_vocabulary=draft_vocabulary)
    dataset = ArrowDataset(IN_A_BATCH, out, on_missing="raise")
    assert list(dataset.approx_lengths) == list(LENGTHS)
    assert find_corrupt_hidden_state_indices(out / "hidden_states", list(range(len(LENGTHS)))) == {}
    for i in range(len(dataset)):
        check_hidden_states(dataset.transfer.get_cached(i), dataset.data[i]["input_ids"].tolist())
    whole = CollateFn(IN_A_BATCH, HIDDEN_SIZE)([dataset[i] for i in range(len(dataset))])
    first = slice(0, LENGTHS[0])
    require_about_equal(
        whole["hidden_states"][:, first], taught.blocks(whole["input_ids"][:, first]), torch.ones(1, LENGTHS[0])
    )
    batch = CollateFn(IN_A_BATCH, HIDDEN_SIZE, dtype=torch.float32, preprocess=shift_batch)(
        [dataset[i] for i in range(len(dataset))]
    )
    assert batch["error_records"] == 0

    arguments: Any = SimpleNamespace(
        d2t_path=None,
        t2d_path=None,
        data_path=str(out),
        draft_vocab_size=draft_vocabulary,
        token_freq_path=None,
        verifier_name_or_path=str(taught.folder),
        trust_remote_code=False,
    )
    d2t, t2d, size = parse_vocab_mappings(arguments)
    assert size == (draft_vocabulary or VOCABULARY)
    config = AutoConfig.from_pretrained(taught.folder)
    config.num_hidden_layers = 1
    model = Eagle3DraftModel.from_training_args(
        config,
        t2d=t2d,
        d2t=d2t,
        draft_vocab_size=size,
        norm_before_residual=False,
        ttt_steps=1,
        verifier_name_or_path=str(taught.folder),
        draft_attn_impl="eager",
    ).float()
    layers = [block - 1 for block in model.target_layer_ids]
    assert layers == [1, 3, 4], "the blocks that were exported are those that their trainer expects"

    kept_V = torch.ones(VOCABULARY, dtype=torch.bool) if t2d is None else t2d
    # Their rows are of tokens 1 to L - 1: row i is about what comes after token i + 1 of the document.
    of_documents = [taught.logits(dataset[i]["input_ids"][None])[:, 1:] for i in range(len(dataset))]
    padding = torch.zeros(1, IN_A_BATCH - sum(LENGTHS) + len(LENGTHS), VOCABULARY)
    logits_1TV = torch.cat([*of_documents, padding], dim=1)[..., kept_V]
    with torch.no_grad():
        targets_1TD = model.verifier_lm_head(model.verifier_norm(batch["verifier_last_hidden_states"]))
    losses = resolve_loss_config("kl_div", "eager")

    def loss_of(rows: torch.Tensor) -> tuple[float, float]:
        asked = batch["loss_mask"].clone()
        loss, metrics = compute_metrics(rows, targets_1TD, batch["loss_mask"], asked, 0, 1.0, loss_config=losses)
        return float(loss), float(metrics["full_acc_0_sum"] / metrics["full_acc_0_total"])

    student, accuracy = loss_of(logits_1TV)
    late, early = (loss_of(logits_1TV.roll(by, 1))[0] for by in (1, -1))
    table_row(f"speculators ({draft_vocabulary or 'whole'} vocabulary)", "speculators", student, min(late, early))
    assert 0 <= student < ABOUT_ZERO
    assert accuracy > 0.97
    assert min(late, early) > 100 * max(student, 1e-3)

    _, of_draft, _ = model(
        **{name: batch[name] for name in batch if name != "error_records"}, ttt_steps=1, loss_config=losses
    )
    assert torch.isfinite(of_draft), "their own draft model takes the batch as it is"


def test_speculators_makes_the_same_maps_of_the_counts_as_are_exported(taught: Taught, tmp_path: Path) -> None:
    pytest.importorskip("speculators")
    from speculators.train.data import ArrowDataset
    from speculators.train.vocab_mapping import (
        build_vocab_mappings_from_distribution,
        save_token_frequency_distribution,
    )

    out = taught.exported("speculators", tmp_path / "out", draft_vocabulary=50)
    counted = torch.load(out / "token_freq.pt", weights_only=True)
    save_token_frequency_distribution(ArrowDataset(IN_A_BATCH, out, on_missing="raise").data, tmp_path / "theirs.pt")
    assert counted == torch.load(tmp_path / "theirs.pt", weights_only=True)
    d2t, t2d = build_vocab_mappings_from_distribution(counted, 50, VOCABULARY)
    assert torch.equal(d2t, torch.from_numpy(np.load(out / "d2t-50.npy")))
    assert torch.equal(t2d, torch.from_numpy(np.load(out / "t2d-50.npy")))
