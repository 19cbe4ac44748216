"""Writes the tables of docs/measurements.md anew from the rows in benchmarks/results.

    python benchmarks/tables.py            # write
    python benchmarks/tables.py --check    # only say whether a table differs from its rows

A table stands between `<!-- NAME.json -->` and `<!-- end -->`, where NAME.json is the file with its rows.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import fidelity
import layer_times
import parallel_tables
import speed
import transformer_speed
import vae

import memory

_ROOT = Path(__file__).parents[1]
_DOCUMENT = _ROOT / "docs" / "measurements.md"
_RESULTS = _ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """What the benchmark printed when it had measured these rows."""
    document = json.loads((_RESULTS / name).read_text())
    printed = io.StringIO()
    with redirect_stdout(printed):
        if "parallel_in_time" in document["options"]:
            parallel_tables.report(document)
        elif "models" in document["options"]:
            layer_times.report(document["rows"])
        elif "words" in document["options"]:
            transformer_speed.report(document["rows"], argparse.Namespace(**document["options"]))
        elif "bands" in document["options"]:
            fidelity.report(document["rows"])
        elif "latents" in document["options"]:
            memory.report(document["rows"])
        elif "works" in document["options"]:
            vae.report(document["rows"], document["memory"], argparse.Namespace(**document["options"]))
        else:
            speed.report(document["rows"], document["memory"], argparse.Namespace(**document["options"]))
    return printed.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = _DOCUMENT.read_text()
    after = _TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], before)
    if not options.check:
        _DOCUMENT.write_text(after)
    elif before != after:
        sys.exit(f"{_DOCUMENT.relative_to(_ROOT)} differs from its rows; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
