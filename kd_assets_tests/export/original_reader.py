"""How the trainer that the `original` export is for reads Parquet, written anew from what its reader does: files by
glob in the order of their names, group of rows after group of rows, each row's lists made into tensors."""

from __future__ import annotations

import glob
from collections.abc import Iterator

import pyarrow.parquet as pq
import torch
from torch import Tensor

_LONG, _FLOAT = torch.long, torch.float32


def read_topk(pattern: str) -> Iterator[dict[str, Tensor]]:
    columns = {"input_ids": _LONG, "attn_mask": _LONG, "topk_ids": _LONG, "topk_logprobs": _FLOAT}
    return _rows(pattern, columns, {})


def read_features(pattern: str, block: int) -> Iterator[dict[str, Tensor]]:
    name = f"hidden_L{block}"
    return _rows(pattern, {"input_ids": _LONG, "attn_mask": _LONG, name: _FLOAT}, {name: "teacher_feats"})


def read_embeddings(pattern: str) -> Iterator[dict[str, Tensor]]:
    name = "pooled_embedding"
    return _rows(pattern, {"input_ids": _LONG, "attn_mask": _LONG, name: _FLOAT}, {name: "teacher_embed"})


def _rows(pattern: str, columns: dict[str, torch.dtype], renamed: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    files = sorted(glob.glob(pattern))
    assert files, f"no file is at {pattern}"
    for path in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                lists = file.read_row_group(group, columns=list(columns)).to_pydict()
                for at in range(len(lists["input_ids"])):
                    yield {
                        renamed.get(name, name): torch.tensor(lists[name][at], dtype=dtype)
                        for name, dtype in columns.items()
                    }
