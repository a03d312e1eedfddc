"""MLflow shows numbers as they are, so FLOPs are logged in millions."""

import pytest

from pipeline.tracking.units import readable


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("flops_mean", "mflops_mean"),
        ("flops_std", "mflops_std"),
        ("full_flops", "full_mflops"),
        ("static.distribute_7.flops", "static.distribute_7.mflops"),
    ],
)
def test_counts_are_in_millions(name, new):
    assert readable({name: 31519976.96}) == {new: 31.51997696}


@pytest.mark.parametrize("name", ["flops_saved", "flops_saved_by_pruning", "accuracy", "mflops_mean"])
def test_all_else_stays_as_it_is(name):
    assert readable({name: 0.5}) == {name: 0.5}


def test_share_is_of_the_full_resnet_where_both_are_known():
    assert readable({"flops_mean": 3e6, "full_flops": 12e6})["flops_share"] == 0.25
    for metrics in ({"flops_mean": 3e6}, {"flops_mean": None, "full_flops": 1e6}):
        assert "flops_share" not in readable(metrics)
    assert readable({"flops_mean": None}) == {"mflops_mean": None}
