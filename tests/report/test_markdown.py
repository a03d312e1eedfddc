"""The report's words say what its numbers say."""

import copy

import numpy as np
import pytest

from pipeline.report import markdown
from pipeline.report.markdown import Results

MACHINE = {"device": "CPU, 2 threads, torch 2.14.0", "processor": "Some CPU", "threads": 2}
ANSWER = {
    "batch": 32, "precision": "fp32", "executor": "native", "reliable": True, "speedup": 1.65,
    "speedup_low": 1.5, "speedup_high": 1.7, "ideal": 1.8, "share_of_ideal": 0.9, "milliseconds": 2.0,
    "static_milliseconds": 3.3, "best_static": "packed", "faster_than": "ResNet-20",
    "break_even_many": 0.8, "static_precision": "fp32",
    "sole": {"ResNet-20": {"milliseconds": 2.5, "speedup": 1.25, "speedup_low": 1.2,
                           "speedup_high": 1.3, "reliable": True},
             "ResNet-14": {"milliseconds": 1.5, "speedup": 0.75, "speedup_low": 0.7,
                           "speedup_high": 0.8, "reliable": True}},
}  # fmt: skip


def outcomes(right: int, count: int = 1000, shift: int = 0) -> np.ndarray:
    return np.roll(np.arange(count) < right, shift)


@pytest.fixture
def results() -> Results:
    evaluated = {
        "accuracy": 0.95, "full_accuracy": 0.96, "num_blocks": 15, "blocks_mean": 7.5, "blocks_std": 1.5,
        "flops_mean": 6e7, "flops_saved": 0.4, "unique_policies": 12.0, "effective_policies": 5.5,
        "shuffled_accuracy": 0.93, "best_single_policy_accuracy": 0.94,
        "best_single_policy_blocks": 7.0, "difficulty_spearman": 0.2, "difficulty_spearman_low": 0.1,
        "difficulty_spearman_high": 0.3,
    }  # fmt: skip
    return Results(
        params={
            "gamma": 5.0, "seed": 0, "data.source": "cifar10", "resnet.depth": 110,
            "resnet.mean": (0.5, 0.25, 1.0), "policy_net.input_size": None, "augmentation.flip": True,
        },
        evaluated=evaluated,
        baseline={
            "baseline": {"accuracy": 0.96, "flops": 1e8, "num_blocks": 15},
            "sole": {"20": {"accuracy": 0.90, "flops": 5.9e7}},
            "static": {"first_7": {"accuracy": 0.95, "flops": 7e7, "blocks": 7}},
        },
        outcomes={
            "full": outcomes(960), "blockdrop": outcomes(950), "sole-20": outcomes(900),
            "first-7": outcomes(950, shift=2),
        },
        times={
            "pretrain": {"seconds": None, "images_per_second": None},
            "curriculum": {"seconds": 10.0, "images_per_second": 2000.0, "device": "CPU"},
            "finetune": {"seconds": 30.0, "images_per_second": 900.0, "device": "CPU"},
        },
        benchmark={
            "machine": MACHINE, "answers": [ANSWER], "sweep": [], "left_out": {"cuda_graphs": "no CUDA"},
            "times": [{"kind": "blockdrop"}],
        },
        machine=dict(MACHINE),
    )  # fmt: skip


def changed(results: Results, **parts: dict) -> Results:
    made = copy.deepcopy(results)
    for part, values in parts.items():
        getattr(made, part).update(values)
    return made


def test_first_table_holds_every_network_and_the_papers(results):
    text = markdown.page(results)
    assert "| **BlockDrop** | 95.00 % | 7.50 | 6e+07 | 60.0 % |" in text
    assert "| ResNet-20 | 90.00 % | 9.00 | 5.9e+07 | 59.0 % |" in text
    assert "| FirstK, 7 blocks, finetuned | 95.00 % | 7.00 | 7e+07 | 70.0 % |" in text
    untrained = markdown.page(changed(results, params={"finetune.epochs": 0}))
    assert "| FirstK, 7 blocks, not finetuned |" in untrained
    assert "| BlockDrop in the paper, gamma 10 | 93.60 % | 16.93 | 1.81e+08 |" in text
    shallow = markdown.page(changed(results, params={"resnet.depth": 32}))
    assert "| ResNet-32 with DynConv (CVPR 2020) | 93.58 % |  | 1.11e+08 |" in shallow
    assert "DynConv" not in text
    assert "saves 40.0 % of the FLOPs, its policy network counted, at -1.00 points" in text


def test_papers_numbers_stand_beside_its_own_network_alone(results):
    assert "in the paper" not in markdown.page(changed(results, params={"data.source": "digits"}))


@pytest.mark.parametrize(
    ("right", "flops", "words"),
    [
        (900, 7e7, "**ahead**, more accurate and cheaper"),
        (900, 6.1e7, "**ahead**, more accurate and as dear"),
        (900, 5e7, "more accurate, but dearer"),
        (990, 7e7, "less accurate, but cheaper"),
        (990, 6.1e7, "**behind**, less accurate and as dear"),
        (990, 5e7, "**behind**, less accurate and dearer"),
        (950, 7e7, "their accuracies can't be told apart, and it is cheaper"),
        (946, 5.9e7, "their accuracies can't be told apart, and it is as dear"),  # 4 : 0 images
        (950, 5e7, "their accuracies can't be told apart, and it is dearer"),
    ],
)
def test_verdict_says_who_is_ahead(results, right, flops, words):
    results = changed(results, outcomes={"sole-20": outcomes(right)})
    rival = markdown.Rival(said="X", name="sole-20", accuracy=right / 1000, blocks=9, flops=flops)
    verdict = markdown.verdict(results, rival)
    assert verdict.endswith(f" FLOPs: {words}.")


def test_sole_resnets_that_were_trained_are_compared_in_time(results):
    text = markdown.page(results)
    assert "beside a full ResNet-20: BlockDrop is 1.25 times as fast (95 % interval 1.20 to" in text
    assert "ResNet-14" not in text


def test_no_ratio_of_times_is_stated_for_noise(results):
    noisy = {"milliseconds": 2.5, "speedup": 1.25, "speedup_low": 0.8, "speedup_high": 1.9,
             "reliable": False}  # fmt: skip
    answer = {**ANSWER, **noisy, "sole": {"ResNet-20": noisy}}
    text = markdown.page(changed(results, benchmark={"answers": [answer]}))
    assert "Batch 32, fp32, beside a full ResNet-20: too noisy to compare." in text
    assert "1.25" not in text
    assert "| too noisy | 1.80 | packed, fp32 |" in text
    faster = {**noisy, "speedup_low": 1.1}
    answer = {**ANSWER, **faster, "sole": {"ResNet-20": faster}}
    text = markdown.page(changed(results, benchmark={"answers": [answer]}))
    assert "beside a full ResNet-20: BlockDrop is faster, by between 1.10 and 1.90 times." in text
    assert "| 1.10 to 1.90 | 1.80 | packed, fp32 |" in text
    assert "1.25" not in text


def test_nothing_timed_is_a_whole_page(results):
    empty = {"answers": [], "times": [], "sweep": [], "left_out": {"bf16": "emulated"}}
    text = markdown.page(changed(results, benchmark=empty))
    assert "Nothing could be timed" in text
    assert "speedups.png" not in text
    assert "Left out here: bf16 (emulated)." in text


def test_what_is_left_out_for_one_reason_stands_together(results):
    reasons = {"a": "no CUDA", "b": "too slow", "c": "no CUDA"}
    text = markdown.page(changed(results, benchmark={"left_out": reasons}))
    assert "Left out here: a, c (no CUDA); b (too slow)." in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "Batch 32, fp32: beneficial, 1.65 times as fast (95 % interval 1.50 to 1.70); it would "
             "be up to a kept share of 80 % with many different policies; no slower than a full "
             "ResNet-20."),
        ({"speedup": 0.9, "speedup_low": 0.8, "speedup_high": 0.95}, "**not** beneficial"),
        ({"speedup_low": 0.95}, "no difference"),
        ({"reliable": False, "speedup_low": 0.9}, "too noisy here to say (nothing is claimed)"),
        ({"reliable": False, "speedup_high": 2.6}, "faster, by between 1.50 and 2.60 times"),
        ({"reliable": False, "speedup_low": 0.5, "speedup_high": 0.8},
         "**not** beneficial, slower, by between 1.25 and 2.00 times"),
        ({"static_precision": "bf16"}, "1.70) beside the full ResNet in bf16"),
    ],
)  # fmt: skip
def test_answer_of_the_benchmark_in_words(change, words):
    assert words in markdown.beneficial(ANSWER | change)


def test_answer_without_an_executor_claims_nothing():
    assert "nothing is claimed" in markdown.beneficial({"batch": 1, "precision": "bf16"})


def test_times_of_another_machine_are_called_so(results):
    assert "Another machine" not in markdown.page(results)
    elsewhere = changed(results, machine={"device": "NVIDIA H200"})
    assert "**Another machine than this one** (NVIDIA H200, Some CPU)" in markdown.page(elsewhere)


def test_training_time_is_won_back_after_so_many_images(results):
    # 40 s of learning, (3.3 - 2.0) ms / 32 saved an image
    assert f"won back after {40_000 / (1.3 / 32):.2g} images" in markdown.page(results)
    assert "| pretrain | imported |" in markdown.page(results)
    noisy = {**ANSWER, "reliable": False}
    assert "won back" not in markdown.page(changed(results, benchmark={"answers": [noisy]}))


def test_effort_that_does_not_vary_is_said(results):
    same = changed(results, evaluated={"difficulty_spearman": None})
    assert "can't follow difficulty" in markdown.page(same)


def test_parameters_are_listed_as_yaml(results):
    text = markdown.page(results)
    for line in (
        "resnet.mean: [0.5, 0.25, 1.0]",
        "policy_net.input_size: null",
        "augmentation.flip: true",
    ):
        assert f"\n{line}\n" in text
