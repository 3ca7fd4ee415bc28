"""The `axolotl` export by axolotl's own code: its loader, collators, and the loss of its trainer.

The student is the teacher, so that their KL divergence is about 0, and grows by a large factor where the targets are
shifted by one row.

Runs where `axolotl` 0.19.0, liger-kernel, peft, addict, colorama, posthog, backoff, numba and llvmlite are.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_assets_tests.consumers.taught import ABOUT_ZERO, LENGTHS, VOCABULARY, Taught, make_taught, table_row

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of what the consumers' own code warns of: it is not this project's to mend."""

TARGETS = ("target_logprobs", "target_token_ids", "target_mask")


def tokenizer() -> Any:
    """What pads a batch; token ids are all that it is asked for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0", eos_token="t1"
    )


def loaded(out: Path, prepared: Path) -> Any:
    """The data set as axolotl's trainer gets it of a configuration that names the folder."""
    from axolotl.utils.data.sft import prepare_datasets
    from axolotl.utils.dict import DictDefault

    said = DictDefault(
        {
            "datasets": [{"path": str(out), "type": "completion"}],
            "skip_prepare_dataset": True,
            "dataset_prepared_path": str(prepared),
            "val_set_size": 0,
            "sequence_len": 64,
            "num_epochs": 1,
            "batch_size": 1,
            "micro_batch_size": 1,
            "max_steps": 1,
            "dataset_num_proc": 1,
            "shuffle_merged_datasets": False,
        }
    )
    dataset, _, _, _ = prepare_datasets(said, tokenizer())
    return dataset


def loss_function() -> Any:
    """Of their trainer with kd_alpha 1, kd_ce_alpha 0 and the defaults of the rest, uncompiled."""
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

    return LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        temperature=1.0,
        beta=0.0,
        compiled=False,
        compute_ce_loss=False,
        normalize_topk=False,
    )


def shifted(batch: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same asked rows with the targets of a row beside them."""
    return batch | {name: batch[name].roll(by, 1) for name in TARGETS if name != "target_mask"}


@pytest.mark.parametrize("k", [VOCABULARY, 16])
def test_axolotl_reads_its_export_and_its_loss_of_the_teacher_as_student_is_about_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from axolotl.integrations.kd.trainer import AxolotlKDTrainer

    taught = make_taught(tmp_path, monkeypatch, k=k)
    dataset = loaded(taught.exported("axolotl", tmp_path / "out"), tmp_path / "prepared")
    batch = DataCollatorForKD(tokenizer())([dataset[i] for i in range(len(dataset))])
    assert batch["target_logprobs"].shape == (len(LENGTHS), max(LENGTHS), k)
    asked = batch["target_mask"].bool()[..., 0]
    assert asked.sum() == sum(LENGTHS) - 5 * len(LENGTHS)
    assert torch.equal(asked[:, :-1], batch["labels"][:, 1:] != -100), "row i is asked where token i + 1 is learned"

    def loss_of(given: dict[str, Tensor]) -> float:
        trainer: Any = SimpleNamespace(_kd_loss_fn=loss_function())
        with torch.no_grad():
            return float(AxolotlKDTrainer.compute_loss(trainer, taught.teacher, given))

    student, *others = (loss_of(shifted(dict(batch), by)) for by in (0, 1, -1))
    others = [abs(other) for other in others]
    table_row(f"axolotl (k = {'vocabulary' if k == VOCABULARY else k})", "axolotl", student, min(others))
    assert abs(student) < ABOUT_ZERO
    assert min(others) > 100 * max(abs(student), 1e-3)


def test_axolotls_own_packing_keeps_the_documents_of_its_export_apart(taught: Taught, tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl.integrations.kd.collator import KDBatchSamplerDataCollatorForSeq2Seq
    from axolotl.utils.trainer import add_position_ids

    dataset = loaded(taught.exported("axolotl", tmp_path / "out"), tmp_path / "prepared")
    rows = [add_position_ids(dict(dataset[i])) for i in range(len(dataset))]
    batch = KDBatchSamplerDataCollatorForSeq2Seq(tokenizer())([rows[:2], rows[2:]])
    assert batch["attention_mask"].unique().tolist() == [0, 1, 2]
    ends = torch.from_numpy(np.cumsum(LENGTHS))
    # A document's last row asks for nothing, so that no document is asked for the first token of the next.
    assert batch["target_mask"][0, ends[0] - 1].sum() == batch["target_mask"][1, LENGTHS[2] - 1].sum() == 0
    assert batch["labels"][0, ends[0]] == -100

    def loss_of(given: dict[str, Tensor]) -> float:
        """Of hidden states that were computed of each document by itself, as their attention does by its number."""
        hidden_BTH = torch.zeros(*given["input_ids"].shape, taught.teacher.config.hidden_size)
        for b, row in enumerate(given["attention_mask"]):
            for number in range(1, int(row.max()) + 1):
                at = (row == number).nonzero()[:, 0]
                ids = given["input_ids"][b, at][None]
                hidden_BTH[b, at] = taught.teacher.model(input_ids=ids).last_hidden_state[0]
        targets = {name: given[name] for name in TARGETS}
        loss = loss_function()(taught.teacher.lm_head.weight, hidden_BTH, **targets, true_labels=given["labels"])
        return float(loss) / int((given["labels"] != -100).sum())

    with torch.no_grad():
        student, *others = (loss_of(shifted(dict(batch), by)) for by in (0, 1, -1))
    table_row("axolotl (packed by axolotl)", "axolotl", student, min(others))
    assert abs(student) < ABOUT_ZERO
    assert min(others) > 100 * max(abs(student), 1e-3)
