"""Fixtures of the tests of models."""

from checkpoints import folder

__all__ = ["folder"]
