"""Fixtures of the tests that run DVC."""

from waiting import copy  # noqa: F401
