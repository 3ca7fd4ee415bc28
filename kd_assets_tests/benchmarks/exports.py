"""How fast each export format is written, against a plain copy of the bytes it writes, and in how much memory.

    python -m kd_assets_tests.benchmarks.exports --json [--folder /somewhere/on/a/disk] [--formats hf safetensors]

Two stores of made-up numbers: one of states at H = 8,192, whose parts of four documents are each larger than the memory
that an export may take, and one of top-k. By default that of states has 48 documents, 4.8 GB, of which a draft format
takes two thirds and writes 3.2 GB: an export of a real shard has tens of gigabytes, and beside one of a single gigabyte
what a process takes to start would be a good part of all that is measured. Store, export and copy are to fit into the
page cache together: 18 GB for `original`, which writes two bytes for each that it reads.

Each export runs in a process of its own, from a warm page cache; its seconds are those of `export_recipe`, with all
that it imports. Then its files are copied on the same disk, by `shutil.copyfile` from a warm page cache, and each is
synced, as each file of the export is (which syncs folders and its journal, too). Before either begins, nothing waits to
be written to the disk, and as much memory as the store has bytes was just filled and given back: a virtual machine gets
memory that it has not used for a while from its host page by page, which takes longer than to copy it, and would hit
the one or the other by chance.

`<format>_mb_per_s` counts the bytes that are written (MB = 10⁶ bytes), `<format>_share_of_copy` is that rate as a share
of the copy's, `<format>_cpu_s_per_gb` the processor time of all threads of the export, which others on the machine
change less than its rate, and `<format>_peak_rss_mb` the most memory that the process had. A format that is written
from both stores has its figures of top-k under `<format>_topk_…`; one that cannot be written from either has the reason
under `<format>_error`. Figures are medians, of memory the largest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets.contract import Asset
from kd_assets.errors import KdAssetsError
from kd_assets.export.exporting import export_recipe
from kd_assets.export.formats import FORMATS
from kd_assets.store import (
    Documents,
    ResultWriter,
    encode_hidden_states,
    encode_shard,
    encode_topk,
    part_stats,
    plan_output,
)
from kd_assets.store.schema import HiddenState
from kd_assets.store.writing.documents import offsets_of

RECIPE, KEY = "exports", "exports-00000"
N_BLOCKS, VOCABULARY, K = 8, 128_256, 16
PART_DOCUMENTS = {"hidden_state_cache": 4, "topk_cache": 64}
CHUNK_BYTES = 4 << 20
STATES: tuple[HiddenState, ...] = (1, 3, 4, 7, "before_norm", "after_norm")
"""What the formats of draft heads ask of a teacher of eight blocks."""


def documents(n: int, n_tokens: int) -> Documents:
    rng = np.random.default_rng(0)
    return Documents(
        document_ids=[f"document-{i}" for i in range(n)],
        offsets=offsets_of(np.full(n, n_tokens, dtype=np.int64)),
        input_ids=rng.integers(0, VOCABULARY, n * n_tokens, dtype=np.uint32),
        loss_mask=np.ones(n * n_tokens, dtype=np.bool_),
    )


def commit(store: Path, asset: Asset, whole: Documents, *, hidden_size: int, part_documents: int) -> None:
    identity: dict[str, Any] = {"asset": asset, "format_version": 1, "params": {"k": K}, "input": "made up"}
    out = plan_output(asset, identity, recipe_folder=store / RECIPE, partition_key=KEY)
    teacher = write_teacher(store, hidden_size)
    with ResultWriter(out, recipe=RECIPE, recipe_folder=store / RECIPE, partition_key=KEY) as writer:
        firsts = range(0, whole.n_documents, part_documents)
        for index, first in enumerate(firsts):
            part = whole.slice(first, min(part_documents, whole.n_documents - first))
            rows = table(asset, part, hidden_size)
            writer.write_part(index, rows, n_tokens=part.n_tokens, stats=part_stats(asset, rows))
        provenance = {"teacher_folder": str(teacher), "tokenizer": str(teacher), "teacher": "made up"}
        writer.commit(parts=len(firsts), checks={}, provenance=provenance, facts={"vocab_size": VOCABULARY})


def table(asset: Asset, part: Documents, hidden_size: int) -> Any:
    rng = np.random.default_rng(1)
    if asset == "shards_manifest":
        return encode_shard(part, ["made up"] * part.n_documents, np.arange(part.n_documents, dtype=np.int64))
    if asset == "hidden_state_cache":
        # Random mantissas and a few exponents: what a state is to a compressor.
        bits = rng.integers(0x3E00, 0x4100, (part.n_tokens, hidden_size), dtype=np.uint16)
        return encode_hidden_states(part, {state: np.roll(bits, at) for at, state in enumerate(STATES)})
    m = part.n_tokens - part.n_documents
    return encode_topk(
        part,
        topk_ids_Mk=np.argsort(rng.random((m, 4 * K)), axis=1)[:, :K].astype(np.uint32),
        topk_logprobs_Mk=-np.sort(rng.exponential(3, (m, K))).astype(np.float16) - np.float16(4),
        logsumexp_M=rng.normal(20, 2, m).astype(np.float32),
        target_logprob_M=-rng.exponential(3, m).astype(np.float32),
    )


def write_teacher(store: Path, hidden_size: int) -> Path:
    """A folder with what a configuration says; the weights are nowhere."""
    folder = store / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    said = {"num_hidden_layers": N_BLOCKS, "hidden_size": hidden_size, "vocab_size": VOCABULARY, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def one_export(format_name: str, store: Path, to: Path) -> dict[str, float]:
    """Export in this process; its figures."""
    started, cpu_before_s = time.perf_counter(), time.process_time()
    exported = export_recipe(format_name, store / RECIPE, to)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before_s
    peak_mb = peak_rss_kib() * 1024 / 1e6
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_rss_mb": peak_mb, "n_bytes": float(exported.n_bytes)}


def peak_rss_kib() -> int:
    """Of this program: getrusage would count what the process had before it began it (Linux: VmHWM of proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def in_own_process(format_name: str, store: Path, to: Path) -> dict[str, float]:
    """Raises RuntimeError with the error's words where it fails."""
    command = [sys.executable, "-m", "kd_assets_tests.benchmarks.exports", "--one", format_name, str(store), str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def copy_seconds(folder: Path, to: Path) -> float:
    """Of a plain copy of all files of a folder, synced."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    started = time.perf_counter()
    for path in files:
        copied = to / path.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
        with copied.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def prepare_to_write(work: Path, n_bytes: int) -> None:
    """Make whoever writes next find memory that is in use by this machine already, and a disk that is at rest."""
    work.mkdir(parents=True, exist_ok=True)
    thrown_away = work / "thrown-away"
    with thrown_away.open("wb") as file:
        for _ in range(0, n_bytes, CHUNK_BYTES):
            file.write(bytes(CHUNK_BYTES))
    thrown_away.unlink()
    os.sync()


def read_all(folder: Path) -> None:
    """Have all files of a folder in the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES):
                pass


def figures_of(format_name: str, store: Path, work: Path, *, rounds: int) -> dict[str, float]:
    rates, shares, cpu_s_per_gb, peaks = [], [], [], []
    n_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    for _ in range(rounds):
        read_all(store)
        prepare_to_write(work, n_bytes)
        exported = in_own_process(format_name, store, work / "export")
        rate = exported["n_bytes"] / 1e6 / exported["seconds"]
        read_all(work / "export")
        prepare_to_write(work, n_bytes)
        copied = exported["n_bytes"] / 1e6 / copy_seconds(work / "export", work / "copy")
        rates.append(rate)
        shares.append(rate / copied)
        cpu_s_per_gb.append(exported["cpu_s"] / (exported["n_bytes"] / 1e9))
        peaks.append(exported["peak_rss_mb"])
        shutil.rmtree(work)
    return {
        "mb_per_s": round(statistics.median(rates), 1),
        "share_of_copy": round(statistics.median(shares), 3),
        "cpu_s_per_gb": round(statistics.median(cpu_s_per_gb), 2),
        "peak_rss_mb": round(max(peaks), 1),
    }


def measure(
    folder: Path, *, formats: Sequence[str], state_documents: int, topk_documents: int, hidden_size: int, rounds: int
) -> dict[str, Any]:
    states, topk = folder / "states", folder / "topk"
    of_states, of_topk = documents(state_documents, 1024), documents(topk_documents, 512)
    made: tuple[tuple[Path, Asset, Documents], ...] = (
        (states, "hidden_state_cache", of_states),
        (topk, "topk_cache", of_topk),
    )
    for store, asset, whole in made:
        part_documents = PART_DOCUMENTS[asset]
        commit(store, "shards_manifest", whole, hidden_size=hidden_size, part_documents=part_documents)
        commit(store, asset, whole, hidden_size=hidden_size, part_documents=part_documents)
    figures: dict[str, Any] = {}
    for name in formats:
        found: dict[str, dict[str, float]] = {}
        for store in (states, topk):
            try:
                found[store.name] = figures_of(name, store, folder / "work", rounds=rounds)
            except RuntimeError as e:
                why = str(e)
        if not found:
            figures[f"{name}_error"] = why
        for at, of_store in enumerate(found.values()):
            figures |= {f"{name}{'_topk' if at else ''}_{key}": value for key, value in of_store.items()}
    return figures


def replay_figures() -> dict[str, Any]:
    """Those of the replay server, where its benchmark is in this tree."""
    if importlib.util.find_spec("kd_assets_tests.benchmarks.replay") is None:
        return {}
    figures: dict[str, Any] = importlib.import_module("kd_assets_tests.benchmarks.replay").measure()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--state-documents", type=int, default=48, help="of 1,024 tokens")
    parser.add_argument("--topk-documents", type=int, default=1024, help="of 512 tokens")
    parser.add_argument("--hidden-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("FORMAT", "STORE", "TO"), help="one export, in this process")
    options = parser.parse_args()
    if options.one is not None:
        name, store, to = options.one
        try:
            print(json.dumps(one_export(name, Path(store), Path(to))))
        except KdAssetsError as e:
            raise SystemExit(f"{type(e).__name__}: {' '.join(str(e).split())}") from e
        return
    with tempfile.TemporaryDirectory(prefix="kd-assets-exports-", dir=options.folder) as folder:
        figures = measure(
            Path(folder),
            formats=options.formats,
            state_documents=options.state_documents,
            topk_documents=options.topk_documents,
            hidden_size=options.hidden_size,
            rounds=options.rounds,
        )
    figures |= replay_figures()
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<32} {value}")


if __name__ == "__main__":
    main()
