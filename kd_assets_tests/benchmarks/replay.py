"""How fast the replay server answers, over real HTTP on the loopback address of this machine.

    python -m kd_assets_tests.benchmarks.replay --json

A cache of random numbers, k = 16, documents of 512 tokens; `kd-assets serve` with two processes that answer, and in
this process four connections that ask for whole documents in random order. `replay_positions_per_s` counts positions
of `/v1/completions` with eight documents a request, `replay_binary_positions_per_s` those of `/get_sequence_logprobs/`
in its binary format; `replay_p99_ms` is the 99th percentile of the time that one document takes by `/v1/completions`,
with four asking at a time. The clients read answers and do not parse them: on two cores they are in the server's way
all the same. Figures are of everything after a first answer to every document, which verifies the cache's parts.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kd_assets_tests.benchmarks import exports

CONNECTIONS = 4
DOCUMENTS_A_REQUEST = 8
N_TOKENS = 512


@contextlib.contextmanager
def served(recipe_folder: Path, *arguments: str) -> Iterator[int]:
    """The port of a server of this recipe."""
    command = [sys.executable, "-m", "kd_assets.cli", "serve", str(recipe_folder), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            yield int(said.split(": ")[0].rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def ask(port: int, path: str, bodies: Sequence[bytes]) -> list[float]:
    """Seconds that each of these requests takes, one after the other on one connection."""
    seconds = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for body in bodies:
            started = time.perf_counter()
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            seconds.append(time.perf_counter() - started)
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer[:300]!r}")
    return seconds


def at_once(port: int, path: str, bodies: Sequence[bytes]) -> tuple[float, list[float]]:
    """Seconds of all, and of each, of requests that four connections share."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        of_each = list(threads.map(lambda i: ask(port, path, bodies[i::CONNECTIONS]), range(CONNECTIONS)))
    return time.perf_counter() - started, [seconds for some in of_each for seconds in some]


def measure(*, n_documents: int = 512, rounds: int = 3) -> dict[str, Any]:
    whole = exports.documents(n_documents, N_TOKENS)
    ids = [row.tolist() for row in whole.input_ids.reshape(n_documents, N_TOKENS)]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kd-assets-replay-") as folder:
        exports.commit(Path(folder), "topk_cache", whole, hidden_size=8, part_documents=64)
        with served(Path(folder) / exports.RECIPE) as port:
            order = np.random.default_rng(0)
            batches = [order.permutation(n_documents).reshape(-1, DOCUMENTS_A_REQUEST) for _ in range(rounds)]
            of_batches = [completions([ids[i] for i in batch]) for of_round in batches for batch in of_round]
            binary = [sequences([ids[i] for i in batch]) for of_round in batches for batch in of_round]
            single = [completions([ids[i]]) for _ in range(rounds) for i in order.permutation(n_documents)]
            ask(port, "/v1/completions", of_batches[: n_documents // DOCUMENTS_A_REQUEST])
            n_positions = rounds * n_documents * (N_TOKENS - 1)
            seconds, _ = at_once(port, "/v1/completions", of_batches)
            figures["replay_positions_per_s"] = round(n_positions / seconds)
            seconds, _ = at_once(port, "/get_sequence_logprobs/", binary)
            figures["replay_binary_positions_per_s"] = round(n_positions / seconds)
            _, of_each = at_once(port, "/v1/completions", single)
            figures["replay_p50_ms"] = round(1e3 * float(np.percentile(of_each, 50)), 2)
            figures["replay_p99_ms"] = round(1e3 * float(np.percentile(of_each, 99)), 2)
    return figures


def completions(prompts: Sequence[Sequence[int]]) -> bytes:
    asked = {"prompt": prompts, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": exports.K}
    return json.dumps(asked).encode()


def sequences(prompts: Sequence[Sequence[int]]) -> bytes:
    asked = {"sequences": prompts, "prompt_lengths": [1] * len(prompts), "top_logprobs": exports.K}
    return json.dumps(asked | {"response_format": "binary"}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--documents", type=int, default=512, help="of 512 tokens, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = measure(n_documents=options.documents, rounds=options.rounds)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<32} {value}")


if __name__ == "__main__":
    main()
