"""The report's words say what its numbers say."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.report import markdown
from pipeline.report.markdown import BesideBaseline, Results, TrainingTimes
from pipeline.report.paired import paired_difference
from pipeline.results import (
    Answer,
    Baselines,
    BenchmarkResult,
    BesideSole,
    Evaluation,
    FullResNet,
    SoleResNet,
    Speedup,
    StaticNetwork,
    Timing,
    TimingRow,
    Winner,
)

MACHINE = {"device": "CPU, 2 threads, torch 2.14.0", "processor": "Some CPU", "threads": 2}
FASTER = Speedup(ratio=1.65, low=1.5, high=1.7, reliable=True)
BESIDE_20 = Speedup(ratio=1.25, low=1.2, high=1.3, reliable=True)
BESIDE_14 = Speedup(ratio=0.75, low=0.7, high=0.8, reliable=True)
WINNER = Winner(
    executor="native", milliseconds=2.0, full_milliseconds=3.3, speedup=FASTER, ideal=1.8,
    share_of_ideal=0.9, faster_than="ResNet-20", break_even_many=0.8,
    sole={
        "ResNet-20": BesideSole(milliseconds=2.5, speedup=BESIDE_20),
        "ResNet-14": BesideSole(milliseconds=1.5, speedup=BESIDE_14),
    },
)  # fmt: skip
ANSWER = Answer(batch=32, precision="fp32", full_form="fused", full_precision="fp32", winner=WINNER)
TIMING = Timing(milliseconds=2, milliseconds_25=2, milliseconds_75=2, images_per_second=16_000, rounds=5)
TIMED = TimingRow(
    candidate="native", kind="blockdrop", precision="fp32", batch=32, time=TIMING, speedup=FASTER
)


def correctness(count_correct: int, count: int = 1000, shift: int = 0) -> np.ndarray:
    return np.roll(np.arange(count) < count_correct, shift)


def page(results: Results) -> str:
    """The report with every run of white space as one space, as Markdown reads it."""
    return " ".join(markdown.page(results).split())


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
        },
        benchmark=BenchmarkResult(
            machine=dict(MACHINE), settings={}, answers=[ANSWER], times=[TIMED],
            left_out={"cuda_graphs": "no CUDA"},
        ),
        machine=dict(MACHINE),
    )  # fmt: skip


def changed(results: Results, **parts: dict) -> Results:
    """With other fields or keys in a part."""
    values = {}
    for name, changes in parts.items():
        part = getattr(results, name)
        values[name] = {**part, **changes} if isinstance(part, dict) else replace(part, **changes)
    return replace(results, **values)


def answered(results: Results, **changes) -> Results:
    """With one answer whose winner differs in these fields."""
    answer = replace(ANSWER, winner=replace(WINNER, **changes))
    return changed(results, benchmark={"answers": [answer]})


def test_first_table_holds_every_network_and_the_papers(results):
    text = page(results)
    for words in (
        "| **BlockDrop** | 95.00 % | 7.50 | 6e+07 | 60.0 % |",
        "| ResNet-20 | 90.00 % | 9.00 | 5.9e+07 | 59.0 % |",
        "| FirstK, 7 blocks, finetuned | 95.00 % | 7.00 | 7e+07 | 70.0 % |",
        "| BlockDrop in the paper, gamma 10 | 93.60 % | 16.93 | 1.81e+08 |",
        "BlockDrop saves 40.0 % of the FLOPs, its policy network counted, at -1.00 points",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("sole_flops", "static_flops", "words"),
    [
        (5.9e7, 7e7, "no more FLOPs): ResNet-20; BlockDrop has +5.00 points"),
        (5.9e7, 6.1e7, "no more FLOPs): FirstK, 7 blocks, finetuned; BlockDrop has +0.00 points"),
        (7e7, 7e7, "**Strongest rival:** no network here takes so few FLOPs."),
    ],
)
def test_the_verdict_names_the_most_accurate_network_at_no_more_flops(
    results, sole_flops, static_flops, words
):
    sole = {"20": SoleResNet(accuracy=0.90, flops=sole_flops)}
    static = {"first_7": StaticNetwork(accuracy=0.95, flops=static_flops, blocks=7)}
    text = page(changed(results, baselines={"sole": sole, "static": static}))
    assert words in text
    assert "**Time** on CPU, 2 threads, torch 2.14.0: Batch 32, fp32: beneficial" in text
    assert text.index(words) < text.index("| network | test accuracy |")


RANDOM = {"random_7": StaticNetwork(accuracy=0.95, flops=7e7, blocks=7)}
NOTHING = {"answers": [], "times": [], "left_out": {"bf16": "emulated"}}
REASONS = {"left_out": {"a": "no CUDA", "b": "too slow", "c": "no CUDA"}}
ODD = {"left_out": {"a": "<b> | `x`"}, "machine": {**MACHINE, "processor": "*CPU*"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": {"finetune.epochs": 0}}, ["| FirstK, 7 blocks, not finetuned |"]),
        ({"params": {"resnet.depth": 32}},
         ["| ResNet-32 with DynConv (CVPR 2020) | 93.58 % | | 1.11e+08 |"]),
        ({"evaluated": {"flops_saved": -0.05}},
         ["BlockDrop takes 5.0 % more FLOPs, its policy network counted"]),
        ({"evaluated": {"difficulty_spearman": None}}, ["can't follow difficulty"]),
        ({"baselines": {"static": RANDOM}, "correctness": {"random-7": correctness(950)}},
         ["RandomK is compared in one draw of its blocks"]),
        ({"baselines": {"pruned": {"every_block": SoleResNet(accuracy=0.94, flops=8e7)}},
          "evaluated": {"flops_saved_by_pruning": 0.2, "flops_saved_by_dropping": 0.25},
          "correctness": {"pruned": correctness(940)}},
         ["| pruned ResNet-110 | 94.00 % | 15.00 | 8e+07 | 80.0 % |",
          "Pruning alone saves 20.0 %, and dropping blocks 25.0 % of what pruning leaves: of the FLOPs, "
          "0.800 x 0.750 = 0.600 are left.", "drop blocks of the pruned ResNet",
          "- pruned ResNet-110: BlockDrop has +1.00 points"]),
        ({"benchmark": NOTHING}, ["Nothing could be timed", "Left out here: bf16 (emulated)."]),
        ({"benchmark": REASONS}, ["Left out here: a, c (no CUDA); b (too slow)."]),
        ({"benchmark": ODD}, [r"a (\<b\> \| \`x\`).", r"(\*CPU\*)"]),
        ({"machine": {"device": "NVIDIA H200"}},
         ["**Another machine than this one** (NVIDIA H200, Some CPU)"]),
    ],
)  # fmt: skip
def test_page_says_what_differs(results, changes, words):
    before, text = page(results), page(changed(results, **changes))
    for said in words:
        assert said not in before
        assert said in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": {"data.source": "digits"}}, "in the paper"),  # of another network
        ({"benchmark": NOTHING}, "speedups.png"),
        ({"benchmark": {"answers": [replace(ANSWER, winner=None)]}}, "| executor |"),
    ],
)
def test_page_leaves_out_what_it_does_not_know(results, changes, words):
    assert words in page(results)
    assert words not in page(changed(results, **changes))


@pytest.mark.parametrize(
    ("count_correct", "flops", "words"),
    [
        (900, 7e7, "**ahead**, more accurate and cheaper"),
        (900, 6.1e7, "**ahead**, more accurate and costs as much"),
        (900, 5e7, "more accurate, but dearer"),
        (990, 7e7, "less accurate, but cheaper"),
        (990, 6.1e7, "**behind**, less accurate and costs as much"),
        (990, 5e7, "**behind**, less accurate and dearer"),
        (950, 7e7, "their accuracies can't be told apart, and it is cheaper"),
        (946, 5.9e7, "their accuracies can't be told apart, and it costs as much"),  # 4 : 0 images
        (950, 5e7, "their accuracies can't be told apart, and it is dearer"),
    ],
)
def test_verdict_says_who_is_ahead(results, count_correct, flops, words):
    difference = paired_difference(correctness(950), correctness(count_correct))
    other = BesideBaseline(
        name="X", accuracy=count_correct / 1000, difference=difference, cost_ratio=6e7 / flops
    )
    assert other.verdict == words
    sole = {"20": SoleResNet(accuracy=count_correct / 1000, flops=flops)}
    results = changed(
        results, baselines={"sole": sole}, correctness={"sole-20": correctness(count_correct)}
    )
    assert f"of its FLOPs: {words}." in page(results)


def test_sole_resnets_that_were_trained_are_compared_in_time(results):
    text = page(results)
    assert (
        "beside a ResNet-20 with every block: BlockDrop is 1.25 times as fast (95 % interval 1.20 to"
        in text
    )
    assert "ResNet-14" not in text


@pytest.mark.parametrize(
    ("low", "words", "cell"),
    [
        (0.8, "too noisy to compare", "too noisy"),
        (1.1, "BlockDrop is faster, by between 1.10 and 1.90 times", "1.10 to 1.90"),
    ],
)
def test_no_ratio_of_times_is_stated_for_noise(results, low, words, cell):
    noisy = Speedup(ratio=1.25, low=low, high=1.9, reliable=False)
    sole = {"ResNet-20": BesideSole(milliseconds=2.5, speedup=noisy)}
    text = page(answered(results, speedup=noisy, sole=sole))
    assert f"Batch 32, fp32, beside a ResNet-20 with every block: {words}." in text
    assert f"| {cell} | 1.80 | fused, fp32 |" in text
    assert "1.25" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "Batch 32, fp32: beneficial, 1.65 times as fast (95 % interval 1.50 to 1.70); it would "
             "be up to a keep ratio of 80 % with many different policies; no slower than a "
             "ResNet-20 with every block."),
        ({"ratio": 0.9, "low": 0.8, "high": 0.95}, "**not** beneficial"),
        ({"low": 0.95}, "no difference"),
        ({"reliable": False, "low": 0.9}, "too noisy here to say (nothing is claimed)"),
        ({"reliable": False, "high": 2.6}, "faster, by between 1.50 and 2.60 times"),
        ({"reliable": False, "low": 0.5, "high": 0.8},
         "**not** beneficial, slower, by between 1.25 and 2.00 times"),
    ],
)  # fmt: skip
def test_speed_verdict(change, words):
    winner = replace(WINNER, speedup=replace(FASTER, **change))
    assert words in markdown.speed_verdict(replace(ANSWER, winner=winner))


def test_speed_verdict_of_another_precision_and_without_a_winner():
    said = markdown.speed_verdict(replace(ANSWER, full_precision="bf16"))
    assert "1.70) beside the full ResNet in bf16" in said
    assert "nothing is claimed" in markdown.speed_verdict(replace(ANSWER, winner=None))


def test_training_time_is_won_back_after_so_many_images(results):
    # 40 s of learning, (3.3 - 2.0) ms / 32 saved an image
    assert f"won back after {40_000 / (1.3 / 32):.2g} images" in page(results)
    assert "| pretrain | imported |" in page(results)
    noisy = answered(results, speedup=replace(FASTER, reliable=False))
    assert "won back" not in page(noisy)


def test_parameters_are_listed_as_yaml(results):
    text = markdown.page(changed(results, params={"data.folder": "```\n# no heading"}))
    assert "````yaml\n" in text
    for line in (
        "resnet.mean: [0.5, 0.25, 1.0]",
        "policy_net.input_size: null",
        "augmentation.flip: true",
    ):
        assert f"\n{line}\n" in text
