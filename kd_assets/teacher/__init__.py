"""The teacher pass: load once, run each batch once, feed every cache from it. The only package besides `student` that
imports torch. Imports no dagster.

The model: `load` reads it, `quantised` says what its weights are, `proofs` show that its parts are what the pass takes
them for, `head` is its end in chunks. The devices: `running` holds it on one or several (`ranks`, `follower`),
`compiled` makes its blocks faster, `budget` measures how large a batch may be, `memory` says how it ran out. One batch:
`step` computes it with `forward`, `topk` and `sampling`, `transfer` brings it to the host, `capture` puts it into
document order. One partition: `batching` and `windows` plan it, `partition` runs it, `writer` writes its parts in a
thread, `reference` computes a sample again the plain way. `telemetry`, `host` and `series` watch; `runner` is what
`kd_assets.worker` calls.
"""
