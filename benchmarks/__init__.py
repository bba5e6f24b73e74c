"""Measurements: `python -m benchmarks.NAME`; see docs/performance.md and docs/evaluation.md."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, before torch is imported
