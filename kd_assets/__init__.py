"""Teacher caches for LLM distillation as partitioned Dagster assets, computed by SLURM jobs."""

__version__ = "0.1.0"
