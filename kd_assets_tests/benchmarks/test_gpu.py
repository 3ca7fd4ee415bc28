"""The GPU benchmark's arithmetic, and the program itself on the only shape that a CPU can run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kd_assets_tests.benchmarks import gpu
from kd_assets_tests.benchmarks.figures import Figures, read_figures
from kd_assets_tests.benchmarks.gpu import SHAPES, matmul_parameters, mixed_lengths, model_flops

ASKED = {
    "matmul_tflops_peak",
    "bare_tokens_per_s",
    "pass_tokens_per_s",
    "ratio_to_bare",
    "mfu",
    "hidden_only_tokens_per_s",
    "hidden_only_speedup",
    "three_pass_tokens_per_s",
    "peak_gib",
    "joules_per_token",
    "load_s",
}
UNKNOWN_ON_A_CPU = {"peak_gib", "joules_per_token"}


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "kd_assets_tests.benchmarks.gpu", "--json", *arguments]
    return subprocess.run(argv, capture_output=True, text=True)


def test_tiny_shape_gives_every_figure_and_a_profile(tmp_path: Path) -> None:
    done = benchmark("--shape", "tiny", "--seconds", "0.1", "--folder", str(tmp_path), "--profile", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.keys() >= ASKED
    if figures["gpu"] is None:
        assert {name for name in ASKED if figures[name] is None} == UNKNOWN_ON_A_CPU
    assert all(figures[name] > 0 for name in ASKED - UNKNOWN_ON_A_CPU - {"mfu"})
    assert figures["hidden_only_tokens_per_s"] > figures["pass_tokens_per_s"]
    assert "aten::" in (tmp_path / "p" / "table.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_teacher_too_large_for_the_disk_is_made_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the 70B on a small disk, in a hurry: all of the benchmark but for the loading and the original's way."""
    full = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    figures = Figures(None)
    gpu.measure("tiny", tmp_path, seconds=0.05, with_three_pass=False, figures=figures)
    assert figures.known["load_s"] is None
    assert "made on the device" in figures.known["note"]
    assert figures.known["pass_tokens_per_s"] > 0
    assert not any("three_pass" in name for name in figures.known)


def test_figures_are_kept_as_soon_as_they_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(bench: gpu.Bench) -> None:
        raise InterruptedError

    monkeypatch.setattr(gpu.Bench, "start", cut_off)
    with pytest.raises(InterruptedError):
        gpu.measure("tiny", tmp_path, seconds=0.05, figures=Figures(tmp_path / "figures.json"))
    assert {"matmul_tflops_peak", "load_s", "three_pass_tokens_per_s"} <= read_figures(tmp_path / "figures.json").keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_other_shapes_are_refused_without_a_gpu() -> None:
    done = benchmark("--shape", "llama31_8b")
    assert done.returncode == 1
    assert "sees no CUDA device here: only --shape tiny runs on a CPU" in done.stderr


@pytest.mark.parametrize(
    ("shape", "n_parameters", "gflop_of_matrices", "gflop_of_attention"),
    [
        ("llama31_8b", 8.030e9, 15.01, 0.537),
        ("llama31_70b", 70.554e9, 139.0, 2.686),
        ("qwen3_8b", 8.191e9, 15.14, 0.604),
        ("qwen3_30b_a3b", 30.532e9, 6.08, 0.806),
    ],
)
def test_model_flops_are_those_of_the_published_shapes(
    shape: str, n_parameters: float, gflop_of_matrices: float, gflop_of_attention: float
) -> None:
    """Parameters as the models' cards have them; of the mixture 3.3 billion active, its embedding table 0.3 of them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(n_parameters, rel=1e-3)
    assert 2e-9 * matmul_parameters(model) == pytest.approx(gflop_of_matrices, rel=2e-3)
    attention = model_flops(model, [2048] * 3) / (3 * 2048) - 2 * matmul_parameters(model)
    assert attention / 1e9 == pytest.approx(gflop_of_attention, rel=2e-3)


def test_a_tied_head_counts_once_and_the_table_not_at_all() -> None:
    config = SHAPES["tiny"].config()
    untied = transformers.AutoModelForCausalLM.from_config(config)
    config.tie_word_embeddings = True
    assert matmul_parameters(transformers.AutoModelForCausalLM.from_config(config)) == matmul_parameters(untied)


def test_mixed_lengths_are_of_real_texts_and_the_same_each_time() -> None:
    lengths = mixed_lengths(200_000, longest=8192)
    assert lengths == mixed_lengths(200_000, longest=8192)
    assert 200_000 <= sum(lengths) < 210_000
    assert max(lengths) == 8192
    assert min(lengths) < 200
