"""Names of submitted experiments. (tests/servers/test_slurm.py submits them to a real cluster.)"""

import pytest

from pipeline.infra.errors import UserError
from tools.submit import by_name


def test_names_are_of_the_settings_and_tell_signs_apart():
    experiments = ["gamma=5 seed=1", "prune.ratio=0.5", "a_b=-1", "a_b=1", "data.folder='two words'"]
    assert by_name(experiments) == {
        "gamma-5-seed-1": ["gamma=5", "seed=1"],
        "prune.ratio-0.5": ["prune.ratio=0.5"],
        "a_b-minus1": ["a_b=-1"],
        "a_b-1": ["a_b=1"],
        "data.folder-two-words": ["data.folder=two words"],
    }


def test_two_experiments_of_one_name_are_refused_by_both():
    with pytest.raises(UserError, match=r"'x=\[1\]' and 'x=1' are both named x-1"):
        by_name(["x=[1]", "x=1"])
