"""The teacher pass: load once, run each batch once, feed every cache from it. The only package besides `student` that
imports torch.

Four folders: `model` (loading, and what is proved of the loaded weights), `devices` (where the teacher lies: one
process or several, measured, compiled), `batch` (where a batch is computed and reduced), `partition` (which documents
run together, and the parts they become). `runner` is what the worker calls; `recompute` computes a sample again the
plain way; `background_queue` is the thread that takes results and parts off the pass's hands.
"""
