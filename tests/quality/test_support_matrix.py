"""The support matrix says what tests prove: no more, no less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import support_matrix
from distrifusion import support
from distrifusion.support import Line
from support_matrix import SupportMatrix, claim

SUITE = """
import pytest

@pytest.mark.supports("feature", "FreeU")
@pytest.mark.supports("dtype", "fp16 | fp32")
@pytest.mark.parametrize("n", range(3))
def test_passes(n): pass

@pytest.mark.supports("plan", "patch99")
def test_skips(): pytest.skip("needs 99 devices")

@pytest.mark.supports("plan", "patch2")
def test_skips_and_is_proven_elsewhere(): pytest.skip("no")

@pytest.mark.supports("plan", "patch2")
def test_proves_it(): pass
"""
FREE_U, DTYPE = Line("feature", "FreeU", 3), Line("dtype", "fp16 | fp32", 3)
PATCH_2, PATCH_99 = Line("plan", "patch2", 1), Line("plan", "patch99", 7)


def finish(folder: Path, matrix: SupportMatrix, *options: str, suite: str = SUITE) -> int:
    file = folder / f"test_{folder.name}.py"  # one module name for each suite
    file.write_text(suite)
    config = folder / "pytest.ini"
    config.write_text("[pytest]\nmarkers = supports(area, name): x\n")
    words = [
        "-c",
        str(config),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:terminal",
        "--import-mode=importlib",
        *options,
        str(file),
    ]
    return int(pytest.main(words, plugins=[matrix]))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ((FREE_U, DTYPE, PATCH_2, PATCH_99), []),
        ((FREE_U, DTYPE, PATCH_2), []),
        ((FREE_U, DTYPE, PATCH_99), ["the matrix lacks plan 'patch2'"]),
        ((FREE_U, DTYPE, PATCH_2, Line("adapter", "LoRA", 1)), ["the matrix names adapter 'LoRA', which no passing"]),
    ],
    ids=["alike", "skipped tests demand nothing", "lacks a line", "names one too many"],
)
def test_a_whole_run_is_compared(tmp_path: Path, written: tuple[Line, ...], says: list[str]) -> None:
    matrix = SupportMatrix(written, write=False, whole=True)
    assert finish(tmp_path, matrix) == (1 if says else 0)
    differences = matrix.differences()
    assert len(differences) == len(says)
    assert all(found.startswith(said) for found, said in zip(differences, says, strict=True))


def test_a_partial_run_judges_nothing(tmp_path: Path) -> None:
    assert finish(tmp_path, SupportMatrix((), write=False, whole=False)) == 0
    assert finish(tmp_path, SupportMatrix((), write=False, whole=True), "-k", "proves_it") == 0


def test_the_matrix_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, document = tmp_path / "support.json", tmp_path / "support.md"
    monkeypatch.setattr(support_matrix, "DATA", data)
    monkeypatch.setattr(support_matrix, "DOCUMENT", document)
    stale = Line("pipeline", "Gone", 2)
    assert finish(tmp_path, SupportMatrix((PATCH_99, stale), write=True, whole=True)) == 0
    lines = [Line(**row) for row in json.loads(data.read_text())]
    assert lines == [FREE_U, PATCH_2, PATCH_99, DTYPE]
    assert "| FreeU | 3 |" in document.read_text() and "fp16 \\| fp32" in document.read_text()


@pytest.mark.parametrize("words", [["-k", "proves_it"], []])
def test_a_failed_or_partial_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    data = tmp_path / "support.json"
    monkeypatch.setattr(support_matrix, "DATA", data)
    monkeypatch.setattr(support_matrix, "DOCUMENT", tmp_path / "support.md")
    suite = SUITE if words else SUITE + "\ndef test_fails(): assert False\n"
    assert finish(tmp_path, SupportMatrix((), write=True, whole=True), *words, suite=suite) == 1
    assert not data.exists()


@pytest.mark.parametrize("args", [(), ("plan",), ("plans", "x"), ("plan", " "), ("plan", 2), ("plan", "a", "b")])
def test_markers_of_another_form_are_refused(args: tuple[object, ...]) -> None:
    with pytest.raises(pytest.UsageError, match="must be an area, one of pipeline"):
        claim(pytest.mark.supports(*args).mark)


def test_the_committed_matrix_is_readable() -> None:
    lines = support.matrix()
    assert len({(line.area, line.name) for line in lines}) == len(lines)
    assert all(line.area in support.AREAS and line.proofs > 0 for line in lines)
