"""For all tests. Imports no dagster: the compute plane's tests run where it is not installed."""

from __future__ import annotations

import os

# No test calls home, whatever instance it makes.
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
