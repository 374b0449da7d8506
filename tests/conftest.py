"""Rules that hold for every test: required ones may not be skipped in CI."""

from __future__ import annotations

import os

import pytest

REQUIRED = ("kernel", "system")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # noqa: ARG001, ANN201
    outcome = yield
    report = outcome.get_result()
    required = any(item.get_closest_marker(name) for name in REQUIRED)
    if report.skipped and required and "CI" in os.environ:
        report.outcome = "failed"
        report.longrepr = f"required test was skipped: {report.longrepr}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in (config.option.markexpr or ""):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]
