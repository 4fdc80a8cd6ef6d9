"""Run one case in this process and print its result: `python -m tests.benchmarks.harness.case MODULE:FUNCTION JSON`.

MODULE is relative to tests.benchmarks; JSON holds the function's keyword arguments. The function returns a dict of numbers;
``cpu`` and ``wall`` are the seconds of a unit of work.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

MARK = "case-result "


def main(case: str, arguments: str) -> None:
    """Run the case and print its result behind MARK."""
    module, _, function = case.partition(":")
    result = getattr(import_module(f"tests.benchmarks.{module}"), function)(**json.loads(arguments))
    print("\n" + MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
