"""SpecForge's and ModelOpt's own readers, collators and losses on exports of a real, tiny teacher.

The student is the teacher: its logits come from a forward pass of its own over the batch that their collator made, and
their loss compares them with what the export says. What is left of the cross-entropy when the targets' entropy is taken
off is about 0, and grows by a large factor where the student's rows are shifted by one.

Runs where `specforge` 0.2.0 and `nvidia-modelopt` 0.47.0 are installed, without their other requirements but triton
(imported, not run), omegaconf, pulp, scipy and nvidia-ml-py; with TORCHDYNAMO_DISABLE=1, since SpecForge compiles its
loss, which takes a C++ compiler. `-s` shows the rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_assets.export.exporting import export_recipe
from kd_assets.export.format import ExportOptions
from kd_assets.store.schema import HiddenState
from kd_assets_tests.export import made_up
from kd_assets_tests.export.made_up import Truth

pytestmark = pytest.mark.filterwarnings("ignore")
"""Of what the consumers' own code warns of: it is not this project's to mend."""

VOCABULARY, HIDDEN_SIZE, N_BLOCKS = 200, 32, 8
AUXILIARY = (1, 3, 4)
LAST = N_BLOCKS - 1
MAX_LENGTH = 64
ABOUT_ZERO = 0.001
"""Of a loss in nats: what rounding states to bfloat16 may cost."""


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


@pytest.fixture
def taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taught:
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
    model.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    teacher = model.float().eval()
    states: tuple[HiddenState, ...] = (*AUXILIARY, LAST, "before_norm", "after_norm")
    monkeypatch.setattr(made_up, "STATES", states)
    documents = [document_of(teacher, i, length) for i, length in enumerate((40, 23, 31, 12))]
    made_up.commit(
        tmp_path / "store",
        documents,
        assets=("shards_manifest", "hidden_state_cache"),
        facts={"vocab_size": VOCABULARY},
        provenance={"teacher_folder": str(tmp_path / "teacher")},
    )
    return Taught(teacher=teacher, folder=tmp_path / "teacher", store=tmp_path / "store")


@torch.no_grad()
def document_of(teacher: Any, seed: int, length: int) -> Truth:
    """Five random tokens and, learned, what the teacher finds most probable after them; with all of its states."""
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
    teacher(input_ids=ids)
    for hook in (*hooks, norm_hook):
        hook.remove()
    bits = {name: state.reshape(length, -1).bfloat16().view(torch.int16) for name, state in outputs.items()}
    nothing = np.zeros(0, dtype=np.float32)
    return Truth(
        partition_key="made-up-00000",
        document_id=f"d{seed}",
        ids_L=ids[0].numpy().astype(np.uint32),
        mask_L=np.arange(length) >= 5,
        topk_ids_Mk=np.zeros((0, 1), dtype=np.uint32),
        topk_logprobs_Mk=np.zeros((0, 1), dtype=np.float16),
        logsumexp_M=nothing,
        target_logprob_M=nothing,
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
