"""The results of a made-up experiment, and where they come from."""

from datetime import UTC, datetime

import numpy as np
import pytest
from made_results import ANSWER, MACHINE, TIMED, correctness

from pipeline.report.comparison import Results, TrainingTimes
from pipeline.report.markdown import Origin
from pipeline.results import (
    Baselines,
    BenchmarkResult,
    Evaluation,
    FullResNet,
    SoleResNet,
    StaticNetwork,
)


@pytest.fixture
def results() -> Results:
    return Results(
        params={
            "gamma": 5.0, "seed": 0, "data.source": "cifar10", "resnet.family": "cifar",
            "resnet.depth": 110, "resnet.mean": (0.5, 0.25, 1.0), "policy_net.input_size": None,
            "augmentation.flip": True, "finetune.epochs": 1,
        },
        evaluated=Evaluation(
            accuracy=0.95, full_accuracy=0.96, num_blocks=15, blocks_mean=7.5, blocks_std=1.5,
            flops_mean=6e7, flops_std=1e6, full_flops=1e8, flops_saved=0.4, unique_policies=12.0,
            flops_saved_by_pruning=0.0, flops_saved_by_dropping=0.4,
            effective_policies=5.5, shuffled_accuracy=0.93, best_single_policy_accuracy=0.94,
            best_single_policy_validation_accuracy=0.95, best_single_policy_blocks=7.0,
            difficulty_spearman=0.2, difficulty_spearman_low=0.1, difficulty_spearman_high=0.3,
        ),
        baselines=Baselines(
            baseline=FullResNet(accuracy=0.96, loss=0.1, flops=1e8, num_blocks=15),
            sole={"20": SoleResNet(accuracy=0.90, flops=5.9e7)},
            static={"first_7": StaticNetwork(accuracy=0.95, flops=7e7, blocks=7)},
        ),
        correctness={
            "full": correctness(960), "blockdrop": correctness(950), "sole-20": correctness(900),
            "first-7": correctness(950, shift=2),
        },
        times={
            "pretrain": TrainingTimes(seconds=None, images_per_second=None),
            "curriculum": TrainingTimes(seconds=10.0, images_per_second=2000.0, device="CPU"),
            "finetune": TrainingTimes(seconds=30.0, images_per_second=900.0, device="CPU"),
            "sole-20": TrainingTimes(seconds=25.0, images_per_second=800.0, device="GPU"),
        },
        benchmark=BenchmarkResult(
            machine=dict(MACHINE), settings={}, answers=[ANSWER], times=[TIMED],
            left_out={"cuda_graphs": "no CUDA"},
        ),
        blocks=np.array([4] + [7, 8] * 499 + [11]),
        machine=dict(MACHINE),
    )  # fmt: skip


@pytest.fixture
def origin() -> Origin:
    return Origin(
        written=datetime(2026, 11, 29, 10, 5, tzinfo=UTC), commit="17d308e", changed=[], experiment="",
        links={},
    )  # fmt: skip
