"""Several processes train as one does, one of them speaks and writes, and they stop together."""

from pathlib import Path

import in_processes
import pytest
import torch
from in_processes import CASES


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> list[dict[str, dict]]:
    return in_processes.by(2, tmp_path_factory.mktemp("by_two"))


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Numbers and tensors of nested dictionaries and lists, by their place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: torch.tensor(float("nan")) if value is None else torch.as_tensor(value)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case, by_two):
    one = flat(CASES[case]())
    for found in by_two:
        two = flat(found[case])
        assert two.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                two[name].double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_processes_hold_the_same_bytes(case, by_two):
    first, second = (flat(found[case]) for found in by_two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)
