"""What the teacher pass costs on a GPU, against the bare forward and against what the chip can do.

    python3 -m kd_assets_tests.benchmarks.gpu --json --shape llama31_8b

Needs torch, transformers, accelerate, pyarrow and nvidia-ml-py; no dagster, no network, no weights and no data: the
weights are random ones of the named shape, made on the device, and the token ids are random, since neither changes the
time of a dense decoder (a mixture of experts routes random ids evenly, real text less so). The code that runs is that
of production, `TeacherRunner.run`, with all three caches committed to a local disk, nothing left out.

What is compared is measured in turns; the ratios are medians over turns of ratios within a turn.

- documents: 2,048 tokens each (the main figures); and, as `mixed_*`, as long as the topics of CPython's manual
  (`pydoc_data.topics`, four characters a token, cut at 8,192), for padding and short batches;
- bare: the model's own forward with all its logits, in the batching that suits it best, its blocks as the pass runs
  them (compiled where that was proved equal); `bare_eager` is the same as transformers has it;
- pass: one partition from reading the shard to the last manifest. What a partition costs once (the recomputed sample,
  the last part's way to the disk) is in it; `ratio_to_bare_marginal` is without, from partitions of two sizes;
- hidden-only: the hidden-state cache alone, at 22/80 of the depth;
- three-pass: the original's way (a document at a time, three forwards, Python lists) as a yardstick, without its loads.

Names: N = tokens, L = tokens of a document, H = hidden size.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

# As slurm/task.sbatch sets it, and before torch is imported: spinning threads would measure each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import accelerate
import numpy as np
import pyarrow as pa
import torch
import transformers

from kd_assets.contract import CACHES, Asset, EmbeddingParams, HiddenStateParams, Reporter, TeacherParams, TopkParams
from kd_assets.errors import OutOfDeviceMemoryError
from kd_assets.library_internals import attention_of
from kd_assets.model_files.digests import DigestCache
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.store import Documents
from kd_assets.teacher.devices.device import device_name
from kd_assets.teacher.devices.memory import within_memory
from kd_assets.teacher.model.load import DTYPES, Teacher, as_teacher, load_teacher
from kd_assets.teacher.runner import TeacherRunner
from kd_assets.worker.stop_flag import StopFlag
from kd_assets_tests.benchmarks.batch_profile import profile_facts, profiled_forwards
from kd_assets_tests.benchmarks.figures import Figures
from kd_assets_tests.benchmarks.teacher import (
    bare_forward,
    fresh_unit,
    median_ratio,
    original_caches,
    timed,
    write_original,
)
from kd_assets_tests.teacher.tiny import Desk, tiny_documents

K = 16
MAX_LENGTH = 8192
CHARACTERS_PER_TOKEN = 4
TURNS = 3
TIME_LIMIT_S = 420.0
"""Unless said otherwise: no turn begins that would end later, and the whole takes less than eight minutes."""
N_PROFILED = 10
"""Batches."""
BARE_DOCUMENTS = (2, 4, 8, 16)
"""In a batch of the bare forward: 4,096 to 32,768 tokens of full length."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's shape, as its configuration has it."""

    config_class: str
    fields: dict[str, Any]
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    document_tokens: int = 2048
    matmul_size: int = 8192

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(**self.fields)


def llama31(**fields: Any) -> Shape:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    common = {
        "vocab_size": 128_256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
    }
    return Shape(config_class="LlamaConfig", fields=common | fields)


SHAPES = {
    "tiny": Shape(
        config_class="LlamaConfig",
        fields={
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_LENGTH,
        },
        dtype="float32",
        document_tokens=64,
        matmul_size=256,
    ),
    "llama31_8b": llama31(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, head_dim=128
    ),
    "llama31_70b": llama31(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, head_dim=128
    ),
    "qwen3_8b": Shape(
        config_class="Qwen3Config",
        fields={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
        },
    ),
    "qwen3_30b_a3b": Shape(
        config_class="Qwen3MoeConfig",
        fields={
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 40_960,
        },
    ),
}


def random_model(shape: Shape, device: torch.device) -> Any:
    """The model with random weights, each made on the device in its final precision: no second copy anywhere.

    transformers initialises it as for training: every weight small and normal, norms 1, rotary frequencies as computed.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(), dtype=DTYPES[shape.dtype])
    return model.eval().requires_grad_(False)


def matmul_parameters(model: Any) -> float:
    """Weights that a token is multiplied with: all matrices but the embedding table, which is looked up; the head's
    among them, tied or not; of a mixture's experts, as many as are chosen for a token."""
    config = model.config.get_text_config(decoder=True)
    n_experts: int | None = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = config.num_experts_per_tok / n_experts if n_experts else 1.0
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and (weight is not table or weight is head):
            total += weight.numel() * (chosen if ".experts." in name else 1.0)
    return total


def model_flops(model: Any, lengths_D: Sequence[int]) -> float:
    """Floating-point operations of one forward over documents of these lengths, with the logits of every position.

    2 x matmul parameters a token (a product and a sum each), and for causal attention, in each block, 4 x heads x head
    size for each pair of a position and one it attends to (QK^T and AV, 2 each), of which a document has
    L x (L + 1) / 2. Padding, recomputation, softmax and norms count nothing.
    """
    config = model.config.get_text_config(decoder=True)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(length * (length + 1) / 2 for length in lengths_D)
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * head_size * pairs
    return 2.0 * matmul_parameters(model) * sum(lengths_D) + float(attention)


def synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_matmul_tflops(device: torch.device, *, size: int, dtype: torch.dtype, seconds: float) -> float:
    """The best of several timings of a square product of random matrices, the clocks warm: the chip's real peak."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    per_timing = max(1, int(2e13 / (2.0 * size**3))) if device.type == "cuda" else 1

    def products() -> None:
        for _ in range(per_timing):
            torch.mm(a, b, out=out)
        synchronized(device)

    ends = time.perf_counter() + min(seconds, 3.0)
    best = math.inf
    while time.perf_counter() < ends or best == math.inf:
        best = min(best, timed(products))
    return per_timing * 2.0 * size**3 / best / 1e12


def measured_disk_gib_per_s(folder: Path, n_bytes: int) -> float:
    """Plain writing and fsync of one file: what the caches cannot be faster than."""
    block = np.random.default_rng(0).bytes(min(n_bytes, 2**26))
    path = folder / "disk"

    def write() -> None:
        with path.open("wb") as f:
            for _ in range(max(1, n_bytes // len(block))):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())

    seconds = timed(write)
    n_written = path.stat().st_size
    path.unlink()
    return n_written / GIB / seconds


def mixed_lengths(n_tokens: int, *, longest: int) -> list[int]:
    """Lengths of real texts, of `n_tokens` tokens together or a little more: a few long ones, many short ones."""
    lengths = [max(2, min(longest, len(topics[name]) // CHARACTERS_PER_TOKEN)) for name in sorted(topics)]
    order = np.random.default_rng(0).permutation(len(lengths))
    chosen: list[int] = []
    while sum(chosen) < n_tokens:
        chosen.append(lengths[order[len(chosen) % len(lengths)]])
    return chosen


@dataclass(kw_only=True, slots=True)
class Bench:
    """One teacher, measured. Every method leaves the store as it found it."""

    folder: Path
    shape: Shape
    teacher: Teacher
    params: TeacherParams
    seconds: float
    deadline: float
    """When the last turn has to be over, by `time.perf_counter`."""
    desk: Desk = field(init=False)
    runner: TeacherRunner | None = None
    setup_s: float = 0.0
    n_runs: int = 0

    def __post_init__(self) -> None:
        self.desk = Desk(self.folder / "pass")

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def documents(self, lengths: Sequence[int]) -> Documents:
        return tiny_documents(lengths, vocabulary=self.teacher.n_token_ids)

    def full_documents(self, n_tokens: float) -> Documents:
        length = self.shape.document_tokens
        return self.documents([length] * max(2, round(n_tokens / length)))

    def bare(self, documents: Documents, budget: int) -> float:
        """Seconds."""

        def forward() -> None:
            bare_forward(self.teacher.model, documents, budget)
            synchronized(self.device)

        return timed(forward)

    def decoder_only(self, documents: Documents, budget: int) -> float:
        """Seconds of the forward without the head."""

        def forward() -> None:
            bare_forward(self.teacher.decoder, documents, budget)
            synchronized(self.device)

        with torch.inference_mode():
            return timed(forward)

    def bare_rate(self, documents: Documents, budget: int) -> float:
        """Tokens a second, of the fastest of several."""
        self.bare(documents, budget)  # warms up
        n_times = max(1, int(self.seconds / 30 / self.bare(documents, budget)))
        return documents.n_tokens / min(self.bare(documents, budget) for _ in range(n_times))

    def best_bare_budget(self) -> tuple[int, float]:
        """Token budget and rate of the fastest bare forward; budgets for which the memory does not suffice are out."""
        rates: dict[int, float] = {}
        for n_documents in BARE_DOCUMENTS:
            budget = n_documents * self.shape.document_tokens
            documents = self.full_documents(budget)
            with contextlib.suppress(OutOfDeviceMemoryError):
                rates[budget] = within_memory(
                    partial(self.bare_rate, documents), budget, doing="the bare forward", device_remedy=""
                )
            release(self.device)
        best = max(rates, key=lambda budget: rates[budget])
        return best, rates[best]

    def three_pass_rate(self) -> tuple[float, int]:
        """Tokens a second of the original's three forwards and three files, and the documents it was measured on."""
        folder = self.folder / "three"
        folder.mkdir()
        documents = self.full_documents(0)
        columns = original_caches(block_at(len(self.teacher.blocks))).items()

        def work() -> None:
            for name, columns_of in columns:
                write_original(self.teacher.model, documents, columns_of, folder / f"{name}.parquet")

        first_s = timed(work)  # warms up, and says how long it takes
        n_times = max(1, min(4, int(self.seconds / 6 / first_s)))
        seconds = [timed(work) for _ in range(n_times)]
        shutil.rmtree(folder)
        return documents.n_tokens / statistics.median(seconds), documents.n_documents

    def start(self) -> None:
        """Make the runner: its proofs, its compilation and its token budget are the cost of a task's start."""

        def make() -> None:
            self.runner = TeacherRunner(
                self.desk.job(self.params, []), self.reporter(), StopFlag(), teacher=self.teacher
            )
            synchronized(self.device)

        self.setup_s = timed(make)

    def reporter(self) -> Reporter:
        return Reporter(self.desk.events_file, stream=sys.stderr)

    def run(self, shard_folder: Path, key: str, assets: Sequence[Asset] = CACHES) -> tuple[float, dict[str, Any]]:
        """Seconds and facts of one partition; its results are deleted."""
        assert self.runner is not None
        self.n_runs += 1
        unit = fresh_unit(self.desk, shard_folder, self.params, assets, run=self.n_runs, key=key)
        started = time.perf_counter()
        facts = self.runner.run(unit)
        seconds = time.perf_counter() - started
        for output in unit.outputs:
            shutil.rmtree(output.path)
        return seconds, facts

    def loaded_facts(self) -> dict[str, Any]:
        """What the runner said of its teacher: whether it is compiled, how long that took, its budget."""
        (facts,) = self.desk.events("teacher_loaded")
        return {name: facts.get(name) for name in ("head", "compiled", "warm_up_s", "placement", "n_devices")}

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()


def block_at(n_blocks: int) -> int:
    """The block at 22/80 of the depth: block 22 of a 70B."""
    return 22 * n_blocks // 80


def affordable_tokens(bench: Bench, rate: float) -> float:
    """Tokens of a partition that takes about `seconds`, and whose hidden states fill a third of the disk at most."""
    free = shutil.disk_usage(bench.folder).free
    return min(rate * bench.seconds, free / 3 / (2 * bench.teacher.hidden_size))


def turns(bench: Bench, *, budget: int, rate: float) -> dict[str, Any]:
    """The main figures: documents of full length, everything in turns."""
    documents = bench.full_documents(affordable_tokens(bench, rate))
    quarter = documents.slice(0, max(1, documents.n_documents // 4))
    sample = documents.slice(0, max(1, documents.n_documents // 8))
    shard, quarter_shard = bench.desk.commit_shard(documents, "full"), bench.desk.commit_shard(quarter, "quarter")
    first_pass_s, _ = bench.run(quarter_shard, "quarter")
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", "pass", "quarter", "hidden_only")}
    facts: list[dict[str, Any]] = []
    turn_s = 0.0
    while len(facts) < TURNS and (not facts or time.perf_counter() + turn_s < bench.deadline):
        started = time.perf_counter()
        before_s = bench.bare(sample, budget)
        pass_s, pass_facts = bench.run(shard, "full")
        # of the time before and after: a GPU slows down as it warms
        seconds["bare"].append((before_s + bench.bare(sample, budget)) / 2 * documents.n_tokens / sample.n_tokens)
        seconds["pass"].append(pass_s)
        seconds["quarter"].append(bench.run(quarter_shard, "quarter")[0])
        seconds["hidden_only"].append(bench.run(shard, "full", ("hidden_state_cache",))[0])
        facts.append(pass_facts)
        turn_s = time.perf_counter() - started
    decoder_s = bench.decoder_only(sample, budget)
    return turn_figures(bench, documents, quarter, seconds, facts) | {
        "first_pass_s": round(first_pass_s, 3),
        "bare_without_logits_tokens_per_s": round(sample.n_tokens / decoder_s, 1),
    }


def turn_figures(
    bench: Bench,
    documents: Documents,
    quarter: Documents,
    seconds: dict[str, list[float]],
    facts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    n_tokens, flops = documents.n_tokens, model_flops(bench.teacher.model, documents.n_tokens_D.tolist())
    rate = {name: n_tokens / statistics.median(seconds[name]) for name in ("bare", "pass", "hidden_only")}
    marginal_s = [
        (whole - part) * n_tokens / (n_tokens - quarter.n_tokens)
        for whole, part in zip(seconds["pass"], seconds["quarter"], strict=True)
    ]
    joules = [f["joules"] for f in facts if f["joules"] is not None]
    on_gpu = bench.device.type == "cuda"
    return {
        "bare_tokens_per_s": round(rate["bare"], 1),
        "pass_tokens_per_s": round(rate["pass"], 1),
        "hidden_only_tokens_per_s": round(rate["hidden_only"], 1),
        "ratio_to_bare": round(median_ratio(seconds["bare"], seconds["pass"]), 3),
        "ratio_to_bare_marginal": round(median_ratio(seconds["bare"], marginal_s), 3),
        "hidden_only_speedup": round(median_ratio(seconds["pass"], seconds["hidden_only"]), 3),
        "model_gflop_per_token": round(flops / n_tokens / 1e9, 6),
        "peak_gib": round(torch.cuda.max_memory_allocated(bench.device) / GIB, 3) if on_gpu else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved(bench.device) / GIB, 3) if on_gpu else None,
        "joules_per_token": round(statistics.median(joules) / n_tokens, 4) if joules else None,
        "n_documents": documents.n_documents,
        "n_tokens": n_tokens,
        **{name: facts[-1][name] for name in ("token_budget", "compute_s", "recompute_s", "wall_s")},
        **{name: facts[-1].get(name) for name in ("gpu_power_watts", "gpu_sm_clock_mhz", "gpu_throttle_reasons")},
        "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
    }


def mixed(bench: Bench, *, rate: float) -> dict[str, Any]:
    """The pass over documents as long as real texts are; null where the recomputation of a long one does not fit."""
    documents = bench.documents(mixed_lengths(round(affordable_tokens(bench, rate) / 3), longest=MAX_LENGTH))
    shard = bench.desk.commit_shard(documents, "mixed")
    try:
        seconds, facts = bench.run(shard, "mixed")
    except OutOfDeviceMemoryError as e:
        return {"mixed_pass_tokens_per_s": None, "mixed_padding_fraction": None, "mixed_note": str(e)}
    return {
        "mixed_pass_tokens_per_s": round(documents.n_tokens / seconds, 1),
        "mixed_padding_fraction": facts["padding_fraction"],
        "mixed_n_documents": documents.n_documents,
        "mixed_n_tokens": documents.n_tokens,
    }


def profile(bench: Bench, budget: int, folder: Path) -> dict[str, Any]:
    """What the time of ten batches goes to: see `batch_profile`."""
    n_documents = (N_PROFILED + 2) * max(1, budget // bench.shape.document_tokens)
    shard = bench.desk.commit_shard(bench.full_documents(n_documents * bench.shape.document_tokens), "profile")
    with profiled_forwards(bench.teacher.decoder, n=N_PROFILED) as found:
        bench.run(shard, "profile")
    return profile_facts(found, folder)


def made_teacher(shape: Shape, device: torch.device, folder: Path) -> tuple[Teacher, TeacherParams, dict[str, Any]]:
    """The teacher, as production loads it from safetensors on this disk; where they do not fit there, made on the
    device. Also the recipe's parameters, and figures of the loading."""
    model = random_model(shape, device)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    room = shutil.disk_usage(folder).free
    if n_bytes > room / 2:
        note = f"weights of {n_bytes / GIB:.1f} GiB on a disk with {room / GIB:.1f} GiB: made on the device"
        return as_teacher(model, device=device), pass_params(shape, "random", "0" * 64), {"load_s": None, "note": note}
    model_folder = folder / "model"
    started = time.perf_counter()
    model.save_pretrained(model_folder)
    save_s = time.perf_counter() - started
    del model
    release(device)
    digests = DigestCache(folder / "digests.json")
    fingerprint = ""

    def hash_weights() -> None:
        nonlocal fingerprint
        fingerprint = weights_fingerprint(model_folder, digests)

    hash_s = timed(hash_weights)  # the control plane's work, done when it plans
    for path in model_folder.glob("*.safetensors"):
        forget(path)
    params = pass_params(shape, str(model_folder), fingerprint)
    teacher = load_teacher(params, digests=digests, warn=lambda message: print(message, file=sys.stderr))
    shutil.rmtree(model_folder)
    figures = {"load_s": round(teacher.load_s, 3), "save_s": round(save_s, 3), "hash_s": round(hash_s, 3)}
    return teacher, params, figures | {"note": None}


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that it is read from the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def release(device: torch.device) -> None:
    """Give back the memory of what was just deleted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pass_params(shape: Shape, model: str, fingerprint: str) -> TeacherParams:
    """The original's caches, with everything else as a recipe has it by default."""
    n_blocks = shape.fields["num_hidden_layers"]
    return TeacherParams(
        model=model,
        weights_fingerprint=fingerprint,
        tokenizer_fingerprint="0" * 64,
        dtype=shape.dtype,
        topk=TopkParams(k=K, max_length=MAX_LENGTH),
        hidden_states=HiddenStateParams(blocks=(block_at(n_blocks),), max_length=2048),
        embeddings=EmbeddingParams(max_length=MAX_LENGTH),
    )


def measure(
    name: str,
    folder: Path,
    *,
    seconds: float,
    time_limit_s: float = TIME_LIMIT_S,
    with_three_pass: bool = True,
    profile_folder: Path | None = None,
    figures: Figures,
) -> None:
    """Add all figures of a shape to `figures`, each as soon as it is known. Raises RuntimeError where they would say
    nothing: no CUDA device."""
    began = time.perf_counter()
    shape = SHAPES[name]
    if name != "tiny" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device here: only --shape tiny runs on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures.add(shape=name, gpu=device_name(device), versions=versions(), document_tokens=shape.document_tokens)
    peak = measured_matmul_tflops(device, size=shape.matmul_size, dtype=DTYPES[shape.dtype], seconds=seconds)
    figures.add(matmul_tflops_peak=round(peak, 3))
    disk = measured_disk_gib_per_s(folder, 4 * GIB if device.type == "cuda" else 2**24)
    figures.add(disk_gib_per_s=round(disk, 3))
    teacher, params, loading = made_teacher(shape, device, folder)
    figures.add(**loading, n_parameters=teacher.n_parameters, attention=attention_of(teacher.model))
    bench = Bench(
        folder=folder,
        shape=shape,
        teacher=teacher,
        params=params,
        seconds=seconds,
        deadline=began + time_limit_s - seconds,
    )
    try:
        budget, eager_rate = bench.best_bare_budget()
        figures.add(bare_eager_tokens_per_s=round(eager_rate, 1), bare_token_budget=budget)
        three_pass_rate = None
        if with_three_pass:
            three_pass_rate, n_three_pass = bench.three_pass_rate()
            figures.add(three_pass_tokens_per_s=round(three_pass_rate, 1), three_pass_n_documents=n_three_pass)
            release(device)
        bench.start()
        figures.add(setup_s=round(bench.setup_s, 3), **bench.loaded_facts())
        main_figures = turns(bench, budget=budget, rate=eager_rate)
        figures.add(**utilisation(main_figures, peak), **main_figures)
        if three_pass_rate is not None:
            figures.add(speedup_over_three_pass=round(main_figures["pass_tokens_per_s"] / three_pass_rate, 2))
        figures.add(**mixed(bench, rate=eager_rate))
        if profile_folder is not None:
            figures.add(profile=profile(bench, main_figures["token_budget"], profile_folder))
        figures.add(total_s=round(time.perf_counter() - began, 1))
    finally:
        bench.close()


def utilisation(figures: dict[str, Any], peak_tflops: float) -> dict[str, float]:
    """Model FLOPs (see `model_flops`) a second, over what the chip was measured to do."""
    part_of_peak = figures["model_gflop_per_token"] / 1e3 / peak_tflops
    return {
        "mfu": round(figures["pass_tokens_per_s"] * part_of_peak, 4),
        "bare_mfu": round(figures["bare_tokens_per_s"] * part_of_peak, 4),
    }


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "pyarrow": pa.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama31_8b")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long one run of a figure may take")
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT_S, help="seconds; no turn begins that would end later"
    )
    parser.add_argument(
        "--folder", type=Path, help="on a local disk with room for the weights; default: a new one in TMPDIR"
    )
    parser.add_argument("--without-three-pass", action="store_true", help="leave out the original's way")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a table and a trace of ten batches there")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="keep there what is measured so far, as JSON")
    options = parser.parse_args()
    figures = Figures(options.figures)
    with tempfile.TemporaryDirectory(prefix="kd-assets-benchmark-", dir=options.folder) as folder:
        try:
            measure(
                options.shape,
                Path(folder),
                seconds=options.seconds,
                time_limit_s=options.time_limit,
                with_three_pass=not options.without_three_pass,
                profile_folder=options.profile,
                figures=figures,
            )
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            sys.exit(str(e))
    if options.json:
        print(json.dumps(figures.known))
        return
    for name, value in figures.known.items():
        print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
