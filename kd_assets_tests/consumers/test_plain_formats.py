"""Exports that belong to no trainer, by the libraries that open them, and `original` by its trainer's reader and loss,
written anew: it is not on the package index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from kd_assets_tests.consumers.taught import ABOUT_ZERO, LENGTHS, VOCABULARY, Taught, make_taught, table_row
from kd_assets_tests.export.original_reader import read_features, read_topk

Document = tuple[Tensor, Tensor, Tensor]
"""`input_ids` [L], `topk_ids` and `topk_logprobs` [L-1, k]."""


def by_datasets(out: Path) -> Iterator[Document]:
    datasets = pytest.importorskip("datasets")
    for row in datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache")):
        yield torch.tensor(row["input_ids"]), torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"])


def by_safetensors(out: Path) -> Iterator[Document]:
    for path in sorted(out.glob("section-*.safetensors")):
        with safe_open(path, "pt") as file:
            for number in sorted({int(name.split("/")[0]) for name in file.keys()}):  # noqa: SIM118 - it is no mapping
                names = ("input_ids", "topk_ids", "topk_logprobs")
                tokens, ids, logprobs = (file.get_tensor(f"{number}/{name}") for name in names)
                yield tokens, ids, logprobs


def by_the_originals_reader(out: Path) -> Iterator[Document]:
    for row in read_topk(f"{out}/topk_k*/rb_topk_*.parquet"):
        yield row["input_ids"], row["topk_ids"], row["topk_logprobs"]


def divergence(logits_MV: Tensor, ids_Mk: Tensor, logprobs_Mk: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the kept ids and all others as one; [M]."""
    p_Mk, q_Mk = logprobs_Mk.double(), logits_MV.double().log_softmax(-1).gather(1, ids_Mk)
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(1e-9) for log in (p_Mk, q_Mk))
    return (p_Mk.exp() * (p_Mk - q_Mk)).sum(-1) + rest_p * (rest_p / rest_q).log()


def originals_loss(logits_MV: Tensor, ids_Mk: Tensor, logprobs_Mk: Tensor) -> Tensor:
    """Its response loss: over the kept ids alone, at temperature 2, times its square; [M]."""
    q_Mk = (logits_MV.gather(1, ids_Mk) / 2).log_softmax(-1)
    p_Mk = (logprobs_Mk.float() / 2).softmax(-1)
    return kl_div(q_Mk, p_Mk, reduction="none").sum(-1) * 4


@pytest.mark.parametrize("k", [VOCABULARY, 16])
@pytest.mark.parametrize(
    ("name", "library", "read", "loss"),
    [
        ("hf", "datasets", by_datasets, divergence),
        ("safetensors", "safetensors", by_safetensors, divergence),
        ("original", "", by_the_originals_reader, originals_loss),
    ],
)
def test_the_loss_of_the_teacher_as_student_is_about_zero_and_one_row_off_it_is_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    library: str,
    read: Callable[[Path], Iterator[Document]],
    loss: Callable[..., Tensor],
    k: int,
) -> None:
    taught = make_taught(tmp_path, monkeypatch, k=k)
    assets: dict[str, Any] = {"assets": ("topk_cache",)}
    documents = list(read(taught.exported(name, tmp_path / "out", **assets)))
    assert [len(tokens) for tokens, *_ in documents] == list(LENGTHS)

    def loss_of(by: int) -> float:
        rows = []
        for tokens, ids, logprobs in documents:
            logits_MV = taught.logits(tokens.long()[None])[0, :-1]
            rows.append(loss(logits_MV, ids.long().roll(by, 0), logprobs.roll(by, 0)))
        return float(torch.cat(rows).mean())

    student, late, early = (loss_of(by) for by in (0, 1, -1))
    what = f"{name} (k = {'vocabulary' if k == VOCABULARY else k})"
    if library:
        table_row(what, library, student, min(late, early))
    else:
        print(f"\n| {what} | reader written anew | {student:.6f} | {min(late, early):.4f} |")
    assert abs(student) < ABOUT_ZERO
    assert min(late, early) > 100 * max(abs(student), 1e-3)


def test_the_originals_features_are_the_teachers_states(taught: Taught, tmp_path: Path) -> None:
    out = taught.exported("original", tmp_path / "out", assets=("hidden_state_cache",), states=(3,))
    rows = list(read_features(f"{out}/fb_hints_L3/fb_hints_*.parquet", 3))
    assert len(rows) == len(LENGTHS)
    for row in rows:
        states_LH = taught.blocks(row["input_ids"][None])[0].chunk(3, dim=-1)[1]
        torch.testing.assert_close(row["teacher_feats"], states_LH, rtol=0.01, atol=0.01)
        off = cosine_similarity(row["teacher_feats"][1:], states_LH[:-1], dim=-1)
        assert off.mean() < 0.9, "one row off they are others"
