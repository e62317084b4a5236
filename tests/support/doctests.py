"""Runs the examples in docstrings of a package's public names."""

from __future__ import annotations

import doctest
from types import ModuleType


def run_examples(package: ModuleType, name: str | None = None) -> int:
    """Run the examples of a public name, or of the package itself, in the current folder; how many there are.

    They see the public names of the package and nothing else.
    """
    text = (package if name is None else getattr(package, name)).__doc__ or ""
    names = {public: getattr(package, public) for public in package.__all__}
    test = doctest.DocTestParser().get_doctest(text, names, name or package.__name__, None, None)
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert not result.failed, "".join(report)
    return result.attempted
