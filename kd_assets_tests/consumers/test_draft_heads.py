"""SpecForge's and ModelOpt's own readers, collators and losses on exports of a real, tiny teacher.

The student is the teacher: its logits come from a forward pass of its own over the batch that their collator made, and
their loss compares them with what the export says. What is left of the cross-entropy when the targets' entropy is taken
off is about 0, and grows by a large factor where the student's rows are shifted by one.

Runs where `specforge` 0.2.0 and `nvidia-modelopt` 0.47.0 are installed, without their other requirements but triton
(imported, not run), omegaconf, pulp, scipy and nvidia-ml-py; with TORCHDYNAMO_DISABLE=1, since SpecForge compiles its
loss, which takes a C++ compiler. `-s` shows the rows of the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_assets.store.schema import HiddenState
from kd_assets_tests.consumers.taught import (
    ABOUT_ZERO,
    AUXILIARY,
    HIDDEN_SIZE,
    LAST,
    MAX_LENGTH,
    N_BLOCKS,
    VOCABULARY,
    Taught,
    require_about_equal,
    table_row,
)

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of what the consumers' own code warns of: it is not this project's to mend."""


@pytest.mark.parametrize("draft_vocabulary", [None, 50])
def test_specforge_reads_an_eagle3_export_and_its_loss_of_the_teacher_as_student_is_its_entropy(
    taught: Taught, tmp_path: Path, draft_vocabulary: int | None
) -> None:
    pytest.importorskip("specforge")
    from specforge.algorithms.eagle3 import data
    from specforge.core.compact_teacher import compute_target_p_padded_from_hidden, validate_vocab_mapping_consistency
    from specforge.core.lk_loss import compute_acceptance_rate
    from specforge.core.loss import _compute_loss
    from specforge.modeling.target.target_head import TargetHead
    from specforge.runtime.data_plane.feature_store import load_feature_file

    out = taught.exported("specforge", tmp_path / "out", draft_vocabulary=draft_vocabulary)
    reader = data.build_offline_reader(str(out), run_id="run", ttt_length=1, max_len=MAX_LENGTH)
    reader.validate_files = True
    refs = reader.read()
    normalize = data.build_offline_normalizer(MAX_LENGTH)
    raw = [load_feature_file(ref.feature_store_uri.removeprefix("file://")) for ref in refs]
    batch = data.build_offline_collator()([normalize(row) for row in raw])
    assert batch["hidden_state"].shape == (4, 40, 3 * HIDDEN_SIZE)
    require_about_equal(batch["hidden_state"], taught.blocks(batch["input_ids"]), batch["attention_mask"])

    t2d = torch.ones(VOCABULARY, dtype=torch.bool)
    if draft_vocabulary is not None:
        maps = torch.load(out / "vocab_mapping" / "vocab_mapping.pt")
        t2d = maps["t2d"]
        validate_vocab_mapping_consistency(t2d, maps["d2t"])
        assert int(t2d.sum()) == draft_vocabulary
    head = TargetHead.from_pretrained(str(taught.folder))
    _, target_hidden, loss_mask = head.preprocess(batch["input_ids"], batch["target"], batch["loss_mask"])
    target_p, on_draft, argmax, mask = compute_target_p_padded_from_hidden(
        target_hidden, head.fc.weight, t2d, loss_mask, 1
    )
    target_p, on_draft = target_p[:, :-1], on_draft[:, :-1]
    assert mask.sum() > 20

    logits_BTV = taught.logits(batch["input_ids"])
    # A draft's row i predicts token i + 2: the teacher's row i + 1.
    student, late, early = logits_BTV.roll(-1, 1), logits_BTV.roll(-2, 1), logits_BTV
    agreed = (student.argmax(-1) == argmax[:, :-1])[mask[..., 0] > 0].float().mean()
    assert agreed > 0.97
    entropy = _compute_loss(target_p.clamp_min(1e-30).log(), target_p, mask)
    losses = [float(_compute_loss(rows[..., t2d], target_p, mask) - entropy) for rows in (student, late, early)]
    accepted, shifted = (
        float(compute_acceptance_rate(logits=rows[..., t2d], target_probs=on_draft, position_mask=mask)[0])
        for rows in (student, late)
    )
    table_row(f"specforge (EAGLE-3, {draft_vocabulary or 'whole'} vocabulary)", "specforge", losses[0], min(losses[1:]))
    assert abs(losses[0]) < ABOUT_ZERO
    assert min(losses[1:]) > 100 * max(losses[0], 1e-3)
    if draft_vocabulary is None:
        assert accepted > 0.95 > 2 * shifted


class TeachersEnd(nn.Module):
    """The teacher's own end as a draft: from its last block's output at p − 1, the state that predicts token p."""

    sliding_window = None

    def __init__(self, norm: nn.Module, shift: int) -> None:
        super().__init__()
        self.norm, self.shift = norm, shift

    def forward(
        self, *, position_ids: Tensor, noise_embedding: Tensor, target_hidden: Tensor, attention_mask: Any
    ) -> Tensor:
        length = target_hidden.shape[1]
        at_BN = (position_ids[:, length:] - 1 + self.shift).clamp(0, length - 1)
        rows = target_hidden.gather(1, at_BN[..., None].expand(-1, -1, target_hidden.shape[-1]))
        normed: Tensor = self.norm(rows.float())
        return normed


def test_specforge_reads_a_dflash_export_and_its_loss_of_the_teacher_as_student_is_the_teachers(
    taught: Taught, tmp_path: Path
) -> None:
    pytest.importorskip("specforge")
    from specforge.algorithms.common import dflash_family_data as data
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.runtime.data_plane.feature_store import load_feature_file

    out = taught.exported("specforge_dflash", tmp_path / "out", states=(LAST, "after_norm"))
    reader = data.build_dspark_offline_reader("dspark", str(out), run_id="run", ttt_length=1, max_len=MAX_LENGTH)
    reader.validate_files = True
    raw = [load_feature_file(ref.feature_store_uri.removeprefix("file://")) for ref in reader.read()]
    normalize = data.build_dspark_offline_normalizer(MAX_LENGTH)
    batch = data.build_dspark_collator()([normalize(row) for row in raw])
    rebuilt = taught.teacher.model.norm(batch["hidden_states"].float())
    assert torch.allclose(rebuilt, batch["target_last_hidden_states"].float(), atol=0.05)

    found = []
    for shift in (0, 1, -1):
        torch.manual_seed(0)
        model = OnlineDFlashModel(
            TeachersEnd(taught.teacher.model.norm, shift),
            taught.teacher.lm_head,
            taught.teacher.model.embed_tokens,
            mask_token_id=0,
            block_size=4,
            attention_backend="sdpa",
        )
        with torch.no_grad():
            loss, accuracy, _ = model(batch["input_ids"], batch["hidden_states"], batch["loss_mask"])
        found.append((float(loss), float(accuracy)))
    # Of the very blocks and positions that their model asks for; the learned tokens are the teacher's most probable.
    log_p_BTV = taught.logits(batch["input_ids"]).log_softmax(-1)
    said_BT = log_p_BTV[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    asked_BT = torch.zeros_like(said_BT)
    for b, mask in enumerate(batch["loss_mask"]):
        for anchor in range(len(mask) - 1):
            if mask[anchor] and mask[anchor + 1]:
                stop = min(anchor + 4, len(mask))
                asked_BT[b, anchor : stop - 1] += mask[anchor + 1 : stop]
    of_teacher = float(-(said_BT * asked_BT).sum() / asked_BT.sum())
    (loss, accuracy), *shifted = found
    table_row("specforge_dflash", "specforge", loss - of_teacher, min(other for other, _ in shifted) - of_teacher)
    assert abs(loss - of_teacher) < ABOUT_ZERO
    assert accuracy > 0.97
    assert all(other - of_teacher > 100 * max(abs(loss - of_teacher), 1e-3) for other, _ in shifted)
    assert all(other < 0.5 for _, other in shifted)


@pytest.mark.parametrize("states", [None, (*AUXILIARY, "before_norm")])
def test_modelopt_reads_its_export_and_its_loss_of_the_teacher_as_student_is_its_entropy(
    taught: Taught, tmp_path: Path, states: tuple[HiddenState, ...] | None
) -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator, OfflineSupervisedDataset
    from modelopt.torch.speculative.plugins.hf_eagle import HFEagleModel, default_eagle_aux_layer_ids
    from modelopt.torch.speculative.plugins.modeling_eagle import EagleBaseModelOutput

    assert default_eagle_aux_layer_ids(N_BLOCKS) == list(AUXILIARY)
    out = taught.exported("modelopt", tmp_path / "out", states=states)
    dataset = OfflineSupervisedDataset([str(path) for path in sorted(out.glob("*.pt"))], answer_only_loss=True)
    batch = EagleOfflineDataCollator(MAX_LENGTH)([dataset[i] for i in range(len(dataset))])
    outputs = batch["base_model_outputs"]
    assert outputs["base_hidden_prenorm"] is (states is not None)
    base = EagleBaseModelOutput.from_offline_dict(outputs)
    assert base.out_hiddens is not None
    assert base.aux_hiddens is not None
    assert base.aux_hiddens.shape == (4, MAX_LENGTH, 3 * HIDDEN_SIZE)
    require_about_equal(base.aux_hiddens, taught.blocks(batch["input_ids"]), batch["attention_mask"])
    assert torch.equal(batch["labels"][0, :39], batch["input_ids"][0, 1:40])
    hidden = base.out_hiddens.float()
    with torch.no_grad():
        target = taught.teacher.lm_head(taught.teacher.model.norm(hidden) if states is not None else hidden)
    target_p, target_ids = target.softmax(2), target.argmax(-1)
    logits_BTV = taught.logits(batch["input_ids"])

    def loss_of(rows_BTV: Tensor) -> tuple[float, float]:
        # Their slices of the first step: a draft's row i, for token i + 2, is compared with the base's row i + 1.
        loss, accuracy = HFEagleModel._eagle_loss(
            None, target_p[:, 1:], target_ids[:, 1:], rows_BTV[:, :-1], batch["loss_mask"][:, 1:]
        )
        return float(loss), float(accuracy)

    entropy, _ = loss_of(target.roll(-1, 1))
    (student, accuracy), (late, _), (early, _) = (
        loss_of(rows) for rows in (logits_BTV.roll(-1, 1), logits_BTV.roll(-2, 1), logits_BTV)
    )
    which = "before" if states is not None else "after"
    table_row(f"modelopt ({which} the norm)", "nvidia-modelopt", student - entropy, min(late, early) - entropy)
    assert abs(student - entropy) < ABOUT_ZERO
    assert accuracy > 0.97
    assert min(late, early) - entropy > 100 * max(student - entropy, 1e-3)
