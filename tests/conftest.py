"""What every test shares: one thread per rank, the same examples in every run, and the matrix of what they prove."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from distrifusion import support
from support_matrix import Claims, SupportMatrix, covers_all

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support", action="store_true", help="write the support matrix from what this whole run proves"
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes; the one that started them gets all reports
        config.pluginmanager.register(Claims(), "support-claims")
        return
    matrix = SupportMatrix(support.matrix(), config.getoption("--write-support"), covers_all(config))
    config.pluginmanager.register(matrix, "support-matrix")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks are many and cores are few: a rank that takes all cores makes every other one wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
