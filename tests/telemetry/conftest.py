"""The browser and Prometheus of the page's tests."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.telemetry.browser import Browser

INSTALLED = "MEGATRON_IMPLICIT_PAGE_CHECK"
"""The file that tests/run.sh's installation, which runs beside the first tests, makes when it has ended."""


@pytest.fixture(scope="session")
def page_packages() -> None:
    """Waits for prometheus and chromium where they are being installed."""
    done, deadline = os.environ.get(INSTALLED), time.monotonic() + 500
    while done and not Path(done).exists() and time.monotonic() < deadline:
        time.sleep(0.5)


@pytest.fixture(scope="session")
def browser(page_packages: None) -> Iterator[Browser]:
    """A headless Chromium for all tests."""
    started = Browser()
    yield started
    started.close()


@pytest.fixture(scope="session")
def prometheus_program(page_packages: None) -> str:
    """The prometheus binary, or the test is skipped."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs Prometheus (Debian: apt-get install prometheus)")
    return program


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: a folder that MEGATRON_IMPLICIT_PICTURES names, to be looked at, or a temporary one."""
    folder = Path(os.environ.get("MEGATRON_IMPLICIT_PICTURES", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
