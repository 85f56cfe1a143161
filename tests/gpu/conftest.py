"""What went wrong is printed as it happens: time on a lent GPU may end before the tests do."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}) failed:\n{report.longreprtext}", flush=True)
