"""Hidden states on disk: bytes and errors of each codec on a trained teacher's states, and speeds against plain files.

    python -m kd_assets_tests.benchmarks.store_states --json [--folder /somewhere/on/a/disk]

Bytes and errors are of a small teacher that is trained here, on the demo's corpus, in under a minute: the states of all
its blocks, run in bfloat16. `hidden_bytes_ratio` is that of `split` over `raw`, of whole part files;
`fp8_rel_rms` and `int8_rel_rms` (groups of 32) are roots of the mean square of the error over that of the states.

Speeds are of made-up states at H = 8,192, one part of 268 MB, over the bytes of raw states whatever the codec (MB = 10⁶
bytes). Writing goes from arrays to a committed result (columns, statistics, SHA-256, sync), beside writing the same
bytes to a plain file and syncing it; reading goes from a verified result to arrays, documents in random order, beside
reading a plain file in one piece. `hidden_write_ratio` and `hidden_read_ratio` are those rates of `raw` over the plain
file's in the same run; `hidden_first_read_ratio` has the verification in it, which a reader does once. Rounds are
interleaved, figures are medians, from a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_assets.store import (
    CacheReader,
    Documents,
    ResultWriter,
    coded,
    encode_hidden_states,
    part_stats,
    plan_output,
)
from kd_assets.store.codecs.state_codec import CODED, RAW
from kd_assets.store.codecs.states import float32_to_bfloat16
from kd_assets.store.schema import HiddenState
from kd_assets.store.writing.documents import offsets_of

RECIPE, KEY = "states", "states-00000"
HIDDEN_SIZE, N_DOCUMENTS, DOCUMENT_TOKENS = 8192, 32, 512
STEPS, MAX_SECONDS, TRAINED_TOKENS = 300, 60.0, 20_000
CODECS = (RAW, *CODED)

States = dict[HiddenState, npt.NDArray[np.uint16]]


def trained_states(folder: Path, *, steps: int, max_seconds: float, n_tokens: int) -> tuple[Documents, States]:
    """The states of every block of a teacher that is trained on the spot, of documents of the demo's corpus."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd_assets.demo.corpus import DOCUMENTS_FILE, write_corpus
    from kd_assets.demo.teacher import make_teacher
    from kd_assets.demo.training import TrainingPlan

    write_corpus(folder / "corpus")
    make_teacher(folder / "corpus", folder / "teacher", plan=TrainingPlan(steps=steps), max_seconds=max_seconds)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16)
    ids: list[list[int]] = []
    blocks: dict[HiddenState, list[npt.NDArray[np.uint16]]] = {n: [] for n in range(model.config.num_hidden_layers)}
    for line in (folder / "corpus" / DOCUMENTS_FILE).read_text().splitlines():
        if sum(map(len, ids)) >= n_tokens:
            break
        ids.append(tokenizer(json.loads(line)["text"])["input_ids"][:DOCUMENT_TOKENS])
        with torch.no_grad():
            outputs = model.model(torch.tensor([ids[-1]]), output_hidden_states=True).hidden_states
        for block, of_block in blocks.items():
            bits = outputs[int(block) + 1][0].view(torch.int16).numpy().view(np.uint16)
            of_block.append(bits)
    return documents([len(document) for document in ids]), {n: np.concatenate(parts) for n, parts in blocks.items()}


def documents(lengths: list[int]) -> Documents:
    n_tokens = sum(lengths)
    return Documents(
        document_ids=[f"document-{i}" for i in range(len(lengths))],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=np.random.default_rng(0).integers(0, 4096, n_tokens, dtype=np.uint32),
        loss_mask=np.ones(n_tokens, dtype=np.bool_),
    )


def made_up_states(n_tokens: int, hidden_size: int) -> States:
    """Normal numbers, each value of a state of its own scale, as a teacher's are."""
    rng = np.random.default_rng(1)
    scales_H = np.exp(rng.normal(0, 0.5, hidden_size)).astype(np.float32)
    return {0: float32_to_bfloat16(rng.standard_normal((n_tokens, hidden_size), dtype=np.float32) * scales_H)}


def commit(store: Path, codec: str, whole: Documents, states: States) -> Path:
    """The folder of the result of one part."""
    params = {"blocks": sorted(states, key=str), "max_length": DOCUMENT_TOKENS, "codec": codec}
    identity = {"asset": "hidden_state_cache", "format_version": 1, "params": params, "input": "made up"}
    recipe_folder = store / RECIPE
    out = plan_output("hidden_state_cache", identity, recipe_folder=recipe_folder, partition_key=KEY)
    with ResultWriter(out, recipe=RECIPE, recipe_folder=recipe_folder, partition_key=KEY) as writer:
        table = coded(encode_hidden_states(whole, states), codec)
        stats = part_stats("hidden_state_cache", table.decoded) | table.error
        writer.write_part(0, table.stored, n_tokens=whole.n_tokens, stats=stats)
        writer.commit(parts=1, checks={}, provenance={})
    return Path(out.path)


def sizes_and_errors(store: Path, whole: Documents, states: States) -> dict[str, Any]:
    """Of part files, by codec."""
    folders = {codec: commit(store, codec, whole, states) for codec in CODECS}
    readers = {codec: CacheReader.from_folders([folder]) for codec, folder in folders.items()}
    n_bytes = {codec: readers[codec].manifests[0].n_bytes for codec in CODECS}
    stats = {codec: readers[codec].manifests[0].stats for codec in CODECS}
    rms = {codec: stats[codec]["max_codec_relative_rms"] for codec in CODED}
    return {
        "hidden_bytes_ratio": n_bytes["split"] / n_bytes[RAW],
        "fp8_rel_rms": rms["fp8"],
        "int8_rel_rms": rms["int8_32"],
        "int8_128_rel_rms": rms["int8_128"],
        "split_rel_rms": rms["split"],
        "largest_error_of_a_state": {codec: stats[codec]["max_codec_state_error"] for codec in CODED},
        "bytes_ratios": {codec: n_bytes[codec] / n_bytes[RAW] for codec in CODED},
        "n_trained_tokens": whole.n_tokens,
    }


def write_plain(path: Path, array: npt.NDArray[np.uint16]) -> None:
    with path.open("wb") as file:
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def read_plain(path: Path, into: npt.NDArray[np.uint16]) -> None:
    with path.open("rb", buffering=0) as file:
        view, n_read = into.data.cast("B"), 0
        while n_read < len(view):
            n_read += file.readinto(view[n_read:])


def read_all(reader: CacheReader, into: npt.NDArray[np.uint16]) -> None:
    order = list(range(len(reader)))
    random.Random(0).shuffle(order)
    for i in order:
        states = reader[i]["hidden_block_0"]
        np.copyto(into[: len(states)], states)


def speeds(store: Path, *, hidden_size: int, n_documents: int, rounds: int) -> dict[str, Any]:
    """Rates over the bytes of raw states."""
    whole = documents([DOCUMENT_TOKENS] * n_documents)
    states = made_up_states(whole.n_tokens, hidden_size)
    into = np.empty_like(states[0])
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in _works(store, whole, states, into):
            started = time.perf_counter()
            work()
            rates.setdefault(name, []).append(states[0].nbytes / (time.perf_counter() - started) / 1e6)
    found = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "hidden_write_ratio": found["raw write"] / found["plain write"],
        "hidden_read_ratio": found["raw read"] / found["plain read"],
        "hidden_first_read_ratio": found["raw first read"] / found["plain read"],
        "mb_per_s": {name: round(rate) for name, rate in found.items()},
    }


def _works(
    store: Path, whole: Documents, states: States, into: npt.NDArray[np.uint16]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, in an order in which each finds what it needs. Every round begins in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=store) as name:
        folder = Path(name)
        yield "plain write", lambda: write_plain(folder / "plain", states[0])
        yield "plain read", lambda: read_plain(folder / "plain", into)
        (folder / "plain").unlink()
        for codec in CODECS:
            yield f"{codec} write", lambda codec=codec: commit(folder, codec, whole, states)  # type: ignore[misc]
            reader = CacheReader.from_folders([commit(folder, codec, whole, states)], cache_bytes=0)
            yield f"{codec} first read", lambda reader=reader: read_all(reader, into)  # type: ignore[misc]
            yield f"{codec} read", lambda reader=reader: read_all(reader, into)  # type: ignore[misc]
            for path in reader.folders[0].iterdir():
                path.unlink()


def measure(folder: Path | None = None, *, rounds: int = 3) -> dict[str, Any]:
    """All figures; what `kd_assets_tests.benchmarks.store` says of hidden states. `folder`: on the disk that is to be
    measured."""
    with tempfile.TemporaryDirectory(prefix="kd-assets-states-", dir=folder) as name:
        trained = trained_states(Path(name), steps=STEPS, max_seconds=MAX_SECONDS, n_tokens=TRAINED_TOKENS)
        figures = sizes_and_errors(Path(name) / "store", *trained)
        return figures | speeds(Path(name), hidden_size=HIDDEN_SIZE, n_documents=N_DOCUMENTS, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line")
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, rounds=options.rounds), indent=None if options.json else 1))


if __name__ == "__main__":
    main()
