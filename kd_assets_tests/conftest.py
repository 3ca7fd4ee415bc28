"""For all tests. Imports no dagster: the compute plane's tests run where it is not installed."""

from __future__ import annotations

import os

# No test calls home, whatever instance it makes.
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Several tests may share two cores; see slurm/task.sbatch. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
