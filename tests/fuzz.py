"""`make fuzz` loads this as a pytest plugin: every property test runs with fifty times its usual number of examples."""

from __future__ import annotations

import pytest
from hypothesis import is_hypothesis_test, settings

FACTOR = 50


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done: set[int] = set()
    for item in items:
        test = getattr(item, "obj", None)
        if test is not None and is_hypothesis_test(test):
            test = getattr(test, "__func__", test)
            if id(test) in done:  # the cases of one parametrized test are one function
                continue
            done.add(id(test))
            usual = getattr(test, "_hypothesis_internal_use_settings", settings())
            more = settings(usual, max_examples=usual.max_examples * FACTOR, deadline=None)
            # Where hypothesis itself looks; there is no public way once the tests are collected.
            test._hypothesis_internal_use_settings = more
