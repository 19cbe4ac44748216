"""The page about methods says of plans what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distrifusion import Plan, PlanError
from distrifusion.plan.legality import CLASHES
from distrifusion.plan.text import AXES

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
# Those that divide one picture, in the order of the page.
METHODS = ("patch", "ring", "ulysses", "tp", "async", "pipe")


def composition() -> str:
    """A table of which two of the methods compose, as the page has it."""
    columns = METHODS[:0:-1]
    rows = [["", *(f"`{word}`" for word in columns)], ["---"] * len(METHODS)]
    for place, row in enumerate(METHODS[:-1]):
        cells = ["" if column in METHODS[: place + 1] else _composes(row, column) for column in columns]
        rows.append([f"`{row}`", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _composes(one: str, other: str) -> str:
    return "no" if (one, other) in CLASHES or (other, one) in CLASHES else "yes"


def squeezed(table: str) -> str:
    """A table without what only its looks need."""
    return re.sub(r" *\| *", "|", table.strip())


def test_the_table_of_what_composes_is_that_of_clashes() -> None:
    written = re.search(r"<!-- composition -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert written is not None
    assert squeezed(written[1]) == squeezed(composition()), f"\n{composition()}"


@pytest.mark.parametrize("one", METHODS)
@pytest.mark.parametrize("other", METHODS)
def test_what_the_table_says_is_what_a_plan_does(one: str, other: str) -> None:
    if one != other and _composes(one, other) == "yes":
        assert Plan.parse(f"{one}2.{other}3").team == 6
    elif one != other:
        with pytest.raises(PlanError):
            Plan.parse(f"{one}2.{other}3")


@pytest.mark.parametrize("word", AXES)
def test_the_page_says_which_kinds_of_models_a_method_divides(word: str) -> None:
    row = re.search(rf"^\| `{word}<N>` \|[^|]*\| (yes|no) \| (yes|no) \|", PAGE.read_text(), re.MULTILINE)
    assert row is not None
    plan = Plan.parse(f"{word}2")
    for said, check in zip(row.groups(), (plan.check_bands, plan.check_tokens), strict=True):
        if said == "yes":
            check("a model")
        else:
            with pytest.raises(PlanError):
                check("a model")


def test_dp_and_cfg_compose_with_every_method() -> None:
    for word in METHODS:
        assert Plan.parse(f"dp2.cfg2.{word}2").num_ranks == 8
