"""The schedule from the last block to the first."""

import pytest
import torch

from pipeline.policy.curriculum import active_mask, keep_inactive, num_active_blocks


@pytest.mark.parametrize(
    ("epochs_per_block", "expected"),
    [(1, [1, 2, 3, 4, 4, 4]), (2, [1, 1, 2, 2, 3, 3]), (0.5, [1, 3, 4, 4, 4, 4])],
)
def test_blocks_join_one_after_another(epochs_per_block, expected):
    counts = [
        num_active_blocks(epoch, num_blocks=4, epochs_per_block=epochs_per_block) for epoch in range(6)
    ]
    assert counts == expected


def test_a_block_joins_in_its_epoch_where_floats_round_down():
    assert int(7 / 0.07) == 99
    assert num_active_blocks(7, num_blocks=200, epochs_per_block=0.07) == 101


def test_the_last_blocks_are_learnt_first():
    assert active_mask(1, 4).tolist() == [False, False, False, True]
    assert active_mask(3, 4).tolist() == [False, True, True, True]
    assert active_mask(4, 4).all()


def test_a_block_that_is_not_learnt_yet_is_kept():
    actions = torch.tensor([[False, False, True, False], [True, True, False, True]])
    restricted = keep_inactive(actions, active_mask(2, 4))
    assert restricted.tolist() == [[True, True, True, False], [True, True, False, True]]
