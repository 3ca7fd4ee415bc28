"""The teacher pass: load once, run each batch once, feed every cache from it. The only package besides `student` that
imports torch.

`load` finds a decoder's parts and proves them, `batching` says what runs together, `forward` runs it as far as needed,
`head` and `topk` turn final states into next-token log-probabilities a chunk at a time, `capture` puts results into
document order, `writer` writes parts in a thread, `reference` computes a sample again the plain way, `telemetry` reads
the GPU's counters, and `runner` is what `kd_assets.worker` calls. Imports no dagster.
"""
