"""The support matrix follows the tests: a line is what a passing test with the marker `supports(area, name)` proves.

A run of the whole suite fails if the committed matrix names a line that no test proves, or lacks one that a test does.
`pytest --write-support` writes the matrix instead. A test's claims travel with its reports, so that tests may run in
several processes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from distrifusion import support
from distrifusion.support import Line

_ROOT = Path(__file__).parents[1]
DATA = _ROOT / "src" / "distrifusion" / "support.json"
DOCUMENT = _ROOT / "docs" / "support.md"

_CLAIM = "supports"

_OPENING = """\
# What is supported

Every line is proven by tests that pass; the number says how many. `distrifusion models` prints the same list for the
installed version. The file is written by `make support`, and the test suite fails where it says too much or too little.
"""


class Claims:
    """Lets every test's reports say what it claims to prove."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.user_properties += [(_CLAIM, claim(mark)) for mark in item.iter_markers("supports")]


class SupportMatrix(Claims):
    """Collects what the tests of one run proved, and compares or writes it at the end.

    Args:
        written: the committed lines.
        write: write the matrix at the end instead of comparing.
        whole: the run was asked for all tests.
    """

    def __init__(self, written: tuple[Line, ...], write: bool, whole: bool) -> None:
        self._written = written
        self._write = write
        self._whole = whole
        self._claims: dict[str, list[tuple[str, str]]] = {}
        self._outcomes: dict[str, str] = {}
        self._says: list[str] = []

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._whole = self._whole and not items

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        claims = [tuple(value) for key, value in report.user_properties if key == _CLAIM]
        if claims and (report.when == "call" or report.outcome != "passed"):
            self._claims[report.nodeid] = list(dict.fromkeys(claims))
            self._outcomes[report.nodeid] = report.outcome

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._write and (exitstatus or not self._whole):
            self._says = ["the support matrix is not written: that takes a passing run of all tests"]
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self._write:
            lines = self.lines()
            write(lines)
            self._says = [f"{len(lines)} lines of support written to {DATA.name} and {DOCUMENT.name}"]
        elif self._whole and not exitstatus and not session.config.option.collectonly:
            self._says = self.differences()
            if self._says:
                self._says.append("if the tests are right, `make support` writes the matrix anew")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._says:
            terminalreporter.section("support matrix")
        for line in self._says:
            terminalreporter.line(line)

    def lines(self) -> tuple[Line, ...]:
        """What this run proved; lines whose tests were all skipped stay as they were written."""
        proven = Counter(c for test, claims in self._claims.items() for c in claims if self._passed(test))
        lines = [Line(area, name, count) for (area, name), count in proven.items()]
        lines += [line for line in self._written if (line.area, line.name) in self._skipped()]
        areas = list(support.AREAS)
        return tuple(sorted(lines, key=lambda line: (areas.index(line.area), line.name.lower(), line.name)))

    def differences(self) -> list[str]:
        """Where the committed matrix says something else than this run."""
        written = {(line.area, line.name) for line in self._written}
        proven = {(line.area, line.name) for line in self.lines()}
        too_much = [
            f"the matrix names {area} '{name}', which no passing test proves" for area, name in written - proven
        ]
        too_little = [
            f"the matrix lacks {area} '{name}', which a passing test proves" for area, name in proven - written
        ]
        return sorted(too_much) + sorted(too_little)

    def _passed(self, test: str) -> bool:
        return self._outcomes.get(test) == "passed"

    def _skipped(self) -> set[tuple[str, str]]:
        claims = {c for test, claims in self._claims.items() for c in claims if self._outcomes.get(test) == "skipped"}
        return claims - {c for test, claims in self._claims.items() for c in claims if self._passed(test)}


def claim(mark: pytest.Mark) -> tuple[str, str]:
    """Area and name of a `supports` marker.

    Raises:
        pytest.UsageError: if it has another form or the area is unknown.
    """
    match mark.args:
        case (str(area), str(name)) if area in support.AREAS and name.strip() and not mark.kwargs:
            return area, name
    raise pytest.UsageError(
        f"supports{mark.args} must be an area, one of {', '.join(support.AREAS)}, and a name such as 'FreeU'"
    )


def write(lines: tuple[Line, ...]) -> None:
    """Write the matrix for the package and for readers."""
    rows = ",\n".join(" " + json.dumps(asdict(line), ensure_ascii=False) for line in lines)
    DATA.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    parts = [_OPENING]
    for area, heading in support.AREAS.items():
        own = [line for line in lines if line.area == area]
        if own:
            table = "\n".join(f"| {_cell(line.name)} | {line.proofs} |" for line in own)
            parts.append(f"## {heading}\n\n| | tests |\n|---|---|\n{table}\n")
    DOCUMENT.write_text("\n".join(parts), encoding="utf-8")


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def covers_all(config: pytest.Config) -> bool:
    """True if the run was asked for the whole suite."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        return config.rootpath == config.invocation_params.dir
    return [Path(config.invocation_params.dir, arg).resolve() for arg in config.args] == [Path(__file__).parent]
