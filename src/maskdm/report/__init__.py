"""Run directories as self-contained HTML pages, from their files only."""

from __future__ import annotations

from maskdm.report.compare import compare_runs
from maskdm.report.run import write_report

__all__ = ["compare_runs", "write_report"]
