"""What the teacher pass costs on a CPU, against the bare forward and against the way it replaces.

    python -m kd_assets_tests.benchmarks.teacher --json

One run, one set of documents, one model: passages of the English text that CPython carries (`pydoc_data.topics`),
tokenised by a byte-level BPE trained on it here, and a Llama with random weights (16 blocks, hidden size 512,
vocabulary 32,768, float32): no number depends on the weights' values. Rounds interleave what is compared, since other
work on the machine comes and goes; the ratios are medians over rounds of ratios within a round.

- bare: the model's own forward with its logits, in the batching (of three) that suits it best, nothing kept;
- pass: `TeacherRunner.run`, the code of production: all three caches computed, recomputation check, committed to disk;
- hidden-only: the same for the hidden-state cache alone, at a third of the depth;
- three-pass: the original's way as a yardstick. Its shape is kept (three loads, three forwards of one document at a
  time, all blocks and logits each time, Python lists), its bugs are not.

Pass and bare are compared without loading; pass and three-pass with it (one load against three).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# As slurm/task.sbatch sets it, and before torch is imported: spinning threads would measure each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import transformers

from kd_assets.contract import (
    CACHES,
    Asset,
    EmbeddingParams,
    HiddenStateParams,
    Reporter,
    TeacherParams,
    TopkParams,
    WorkUnit,
)
from kd_assets.store import Documents
from kd_assets.store.writing.documents import offsets_of
from kd_assets.teacher.partition.batching import padded_ids, plan_batches
from kd_assets.teacher.runner import TeacherRunner
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.teacher.tiny import Desk, tiny_params

VOCABULARY, HIDDEN_SIZE, N_BLOCKS = 32_768, 512, 16
THIRD_OF_DEPTH = N_BLOCKS // 3
K = 16
PASSAGE_CHARACTERS = 1000
BUDGETS = (1024, 2048, 4096)


def passages() -> list[str]:
    """The corpus in runs of whole lines of at most `PASSAGE_CHARACTERS`: documents of about 30 to 400 tokens."""
    found = []
    for topic in sorted(topics):
        passage = ""
        for line in topics[topic].splitlines(keepends=True):
            if len(passage) + len(line) > PASSAGE_CHARACTERS:
                found.append(passage)
                passage = ""
            passage += line
        found.append(passage)
    return found


def documents_of_corpus(n_tokens: int) -> Documents:
    """Passages from all over the corpus, about `n_tokens` tokens together."""
    texts = passages()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    order = np.random.default_rng(0).permutation(len(texts))
    chosen: list[np.ndarray] = []
    while sum(map(len, chosen)) < n_tokens:
        chosen.append(np.array(tokenizer.encode(texts[order[len(chosen)]]).ids, dtype=np.uint32))
    input_ids = np.concatenate(chosen)
    return Documents(
        document_ids=[f"passage-{i:04d}" for i in order[: len(chosen)]],
        offsets=offsets_of(np.array([len(ids) for ids in chosen])),
        input_ids=input_ids,
        loss_mask=np.ones(len(input_ids), dtype=np.bool_),
    )


def save_model(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1408,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def bare_forward(model: Any, documents: Documents, budget: int) -> None:
    """The model's forward with logits over all documents, nothing kept."""
    for batch in plan_batches(documents.n_tokens_D, token_budget=budget):
        ids_BT = torch.from_numpy(padded_ids(documents.input_ids, documents.offsets, batch)).to(model.device)
        model(input_ids=ids_BT, use_cache=False)


class Passes:
    """The production pass over one committed shard, each time into a fresh store."""

    def __init__(self, folder: Path, documents: Documents, params: TeacherParams) -> None:
        self._desk = Desk(folder / "pass")
        self._shard_folder = self._desk.commit_shard(documents)
        self._params = params
        self._n_runs = 0
        self._report = Reporter(None, stream=io.StringIO())
        self.load_s = timed(self._load)

    def _load(self) -> None:
        job = self._desk.job(self._params, [])
        self._runner = TeacherRunner(job, self._report, StopFlag())

    def run(self, assets: Sequence[Asset] = CACHES) -> dict[str, Any]:
        self._n_runs += 1
        return self._runner.run(fresh_unit(self._desk, self._shard_folder, self._params, assets, run=self._n_runs))

    def close(self) -> None:
        self._runner.close()


def fresh_unit(
    desk: Desk,
    shard_folder: Path,
    params: TeacherParams,
    assets: Sequence[Asset],
    *,
    run: int,
    key: str = "shard-00000",
) -> WorkUnit:
    """A unit whose results are not there yet."""
    unit = desk.unit(shard_folder, params, assets, key=key)
    outputs = tuple(desk.fresh_output(output, run=run, partition_key=key) for output in unit.outputs)
    return dataclasses.replace(unit, outputs=outputs)


Columns = Callable[[Any, torch.Tensor, torch.Tensor], dict[str, Any]]


def three_passes(model_folder: Path, documents: Documents, output_folder: Path) -> None:
    """The original's way: for each cache a load, and a full forward of every document by itself."""
    output_folder.mkdir(parents=True, exist_ok=True)
    for name, columns_of in original_caches(THIRD_OF_DEPTH).items():
        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        write_original(model, documents, columns_of, output_folder / f"{name}.parquet")


def original_caches(block: int) -> dict[str, Columns]:
    """Each cache's columns as the original makes them, from one document and the model."""
    return {"topk": topk_lists, "hidden": partial(hidden_lists, block), "embedding": embedding_lists}


@torch.inference_mode()
def write_original(model: Any, documents: Documents, columns_of: Columns, path: Path) -> None:
    """One cache the original's way: a full forward of every document by itself, and Python lists."""
    rows = []
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids_1L = torch.from_numpy(documents.input_ids[start:end].astype(np.int64)).unsqueeze(0).to(model.device)
        mask_1L = torch.ones_like(ids_1L)
        row = {"input_ids": ids_1L[0].tolist(), "attn_mask": mask_1L[0].tolist()}
        rows.append(row | columns_of(model, ids_1L, mask_1L))
    pq.write_table(pa.Table.from_pylist(rows), path)


def topk_lists(model: Any, ids_1L: torch.Tensor, mask_1L: torch.Tensor) -> dict[str, Any]:
    logits_LV = model(ids_1L, attention_mask=mask_1L).logits[0, :-1]
    top = torch.log_softmax(logits_LV, dim=-1).topk(K)
    return {"topk_ids": top.indices.tolist(), "topk_logprobs": top.values.half().tolist()}


def hidden_lists(block: int, model: Any, ids_1L: torch.Tensor, mask_1L: torch.Tensor) -> dict[str, Any]:
    kept: list[torch.Tensor] = []
    layer = model.get_decoder().layers[block]
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    model(ids_1L, attention_mask=mask_1L)
    handle.remove()
    return {"hidden": kept[0][0].bfloat16().float().tolist()}


def embedding_lists(model: Any, ids_1L: torch.Tensor, mask_1L: torch.Tensor) -> dict[str, Any]:
    last_LH = model(ids_1L, attention_mask=mask_1L, output_hidden_states=True).hidden_states[-1][0]
    return {"pooled_embedding": last_LH.mean(dim=0).tolist()}


def measure(folder: Path, *, n_tokens: int, rounds: int, three_pass_rounds: int) -> dict[str, Any]:
    documents = documents_of_corpus(n_tokens)
    model_folder = folder / "model"
    save_model(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    sample = documents.slice(0, max(1, documents.n_documents // 4))
    bare_forward(model, sample, BUDGETS[0])  # warms up
    budget = min(BUDGETS, key=lambda b: timed(lambda: bare_forward(model, sample, b)))
    passes = Passes(folder, documents, pass_params(model_folder, budget))
    passes.run()  # warms up

    seconds: dict[str, list[float]] = {"bare": [], "pass": [], "hidden_only": [], "three_pass": []}
    for n in range(rounds):
        seconds["bare"].append(timed(lambda: bare_forward(model, documents, budget)))
        seconds["pass"].append(timed(passes.run))
        seconds["hidden_only"].append(timed(lambda: passes.run(("hidden_state_cache",))))
        if n < three_pass_rounds:
            seconds["three_pass"].append(timed(lambda: three_passes(model_folder, documents, folder / "three")))
    return figures(seconds, documents, budget=budget, load_s=passes.load_s, facts=passes.run())


def pass_params(model_folder: Path, budget: int) -> TeacherParams:
    return tiny_params(
        model_folder,
        token_budget=budget,
        part_documents=256,
        part_tokens=131_072,
        topk=TopkParams(k=K, max_length=8192),
        hidden_states=HiddenStateParams(blocks=(THIRD_OF_DEPTH,), max_length=2048),
        embeddings=EmbeddingParams(max_length=8192),
    )


def figures(
    seconds: dict[str, list[float]], documents: Documents, *, budget: int, load_s: float, facts: dict[str, Any]
) -> dict[str, Any]:
    rate = {name: documents.n_tokens / statistics.median(values) for name, values in seconds.items()}
    three_pass = seconds["three_pass"]
    return {
        "bare_tokens_per_s": round(rate["bare"], 1),
        "pass_tokens_per_s": round(rate["pass"], 1),
        "three_pass_tokens_per_s": round(rate["three_pass"], 1),
        "hidden_only_tokens_per_s": round(rate["hidden_only"], 1),
        "ratio_to_bare": round(median_ratio(seconds["bare"], seconds["pass"]), 3),
        "speedup_over_three_pass": round(median_ratio(three_pass, [s + load_s for s in seconds["pass"]]), 3),
        "hidden_only_speedup": round(median_ratio(seconds["pass"], seconds["hidden_only"]), 3),
        "load_s": round(load_s, 3),
        "n_documents": documents.n_documents,
        "n_tokens": documents.n_tokens,
        "token_budget": budget,
        **{name: facts[name] for name in ("padding_fraction", "compute_s", "recompute_s", "wall_s")},
        "n_threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "pyarrow": pa.__version__},
        "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds that have both."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--three-pass-rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-assets-benchmark-") as folder:
        result = measure(
            Path(folder),
            n_tokens=options.tokens,
            rounds=options.rounds,
            three_pass_rounds=min(options.rounds, options.three_pass_rounds),
        )
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
