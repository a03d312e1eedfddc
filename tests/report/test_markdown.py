"""The report's words say what its numbers say."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from made_results import ANSWER, FASTER, MACHINE, WINNER, correctness

from pipeline.report import markdown
from pipeline.report.comparison import Baseline, Comparison, Results, TrainingTimes, training_time
from pipeline.report.markdown import Origin
from pipeline.report.paired import paired_difference
from pipeline.results import BesideSole, SoleResNet, Speedup, StaticNetwork

ANYWHERE = Origin(
    written=datetime(2026, 1, 2, tzinfo=UTC), commit="", changed=[], experiment="", links={}
)

UNTOLD = "accuracies can't be told apart, 86 % of its FLOPs, one image:"


def page(results: Results, origin: Origin = ANYWHERE) -> str:
    """The report with every run of white space as one space, as Markdown reads it."""
    return " ".join(markdown.page(results, origin).split())


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


def test_page_says_when_and_from_which_code_it_was_written(results, origin):
    for origin_now, words in (
        (origin, "2026-11-29 10:05 UTC · commit `17d308e` -"),
        (replace(origin, commit=""), "UTC · no Git commit -"),
        (replace(origin, experiment="a`5"), "UTC · experiment `` a`5 `` from commit `17d308e`"),
        (replace(origin, changed=["params.yaml"]), "with uncommitted changes (`params.yaml`) -"),
        (replace(origin, changed=list("abcde")), "uncommitted changes (`a`, `b`, `c`, and 2 more)"),
        (replace(origin, links={"all runs": "http://h/#/r?a=(b)"}),
         "commit `17d308e` · MLflow (`make ui`): [all runs](<http://h/#/r?a=(b)>)"),
    ):  # fmt: skip
        assert words in page(results, origin_now)
    assert "MLflow" not in page(results, origin)


@pytest.mark.parametrize(
    "row",
    [
        "| ResNet-110, every block | partly, in cost and not in accuracy: less accurate, 60 % of its FL",
        "| **BlockDrop** | | 95.00 % | | 7.50 (4 to 11) | 6e+07, 60.0 % | imported + 10 + 30 | |",
        "| ResNet-20 | **yes, in accuracy**: more accurate, 102 % of its FLOPs | 90.00 % | +5.00 ",
        "50 : 0 | 9 | 5.9e+07, 59.0 % | 25 | |",
        "| FirstK, 7 blocks, finetuned | **yes, in cost**: accuracies can't be told apart, 86 % of its "
        "FLOPs | 95.00 % | +0.00 (-0.",
        " 2 : 2 | 7 | 7e+07, 70.0 % | imported |",
        "| BlockDrop in the paper, gamma 10 | published, another recipe | 93.60 % | | 16.93 | 1.81e",
    ],
)
def test_the_table_holds_every_network_and_the_papers(results, row):
    assert row in page(results)


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
    assert text.index(words) < text.index("| network | is BlockDrop beneficial")


RANDOM = {"random_7": StaticNetwork(accuracy=0.95, flops=7e7, blocks=7)}
NOTHING = {"answers": [], "times": [], "left_out": {"bf16": "emulated"}}
REASONS = {"left_out": {"a": "no CUDA", "b": "too slow", "c": "no CUDA"}}
ODD = {"left_out": {"a": "<b> | `x`"}, "machine": {**MACHINE, "processor": "*CPU*"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": {"finetune.epochs": 0}}, ["| FirstK, 7 blocks, not finetuned |"]),
        ({"params": {"resnet.depth": 32}},
         ["| ResNet-32 with DynConv (CVPR 2020) | published, another recipe | 93.58 % | | | 1.11e+08"]),
        ({"evaluated": {"flops_saved": -0.05}},
         ["BlockDrop takes 5.0 % more FLOPs, its policy network counted"]),
        ({"evaluated": {"difficulty_spearman": None}}, ["can't follow difficulty"]),
        ({"baselines": {"static": RANDOM}, "correctness": {"random-7": correctness(950)}},
         ["RandomK is compared in one draw of its blocks"]),
        ({"baselines": {"pruned": {"every_block": SoleResNet(accuracy=0.94, flops=8e7)}},
          "evaluated": {"flops_saved_by_pruning": 0.2, "flops_saved_by_dropping": 0.25},
          "correctness": {"pruned": correctness(940)}},
         ["| pruned ResNet-110 | **yes, in accuracy", "| 94.00 % | +1.00 (", "| 15 | 8e+07, 80.0 % |",
          "pruning alone saves 20.0 %, and dropping blocks 25.0 % of what pruning leaves, the policy "
          "network counted",
          "0.800 x 0.750 = 0.600 of the FLOPs are left.", "drop blocks of the pruned ResNet",
          "pruning changes it by -2.00 points (", "of the pruned ResNet by +1.00 ("]),
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


def beside(count_correct: int, *, flops: float, speedup: Speedup | None = None) -> Comparison:
    """BlockDrop with 950 of 1000 correct and 6e7 FLOPs beside another network."""
    return Comparison(
        baseline=Baseline("X", "x", count_correct / 1000, 9, flops, ["x"]),
        difference=paired_difference(correctness(950), correctness(count_correct)),
        cost_ratio=6e7 / flops,
        speedup=speedup,
    )


@pytest.mark.parametrize(
    ("count_correct", "flops", "words"),
    [
        (900, 7e7, "**yes, in accuracy and cost**: more accurate, 86 % of its FLOPs"),
        (900, 6.1e7, "**yes, in accuracy**: more accurate, 98 % of its FLOPs"),
        (900, 5e7, "partly, in accuracy and not in cost: more accurate, 120 % of its FLOPs"),
        (990, 7e7, "partly, in cost and not in accuracy: less accurate, 86 % of its FLOPs"),
        (990, 6.1e7, "**no**: less accurate, 98 % of its FLOPs"),
        (990, 5e7, "**no**: less accurate, 120 % of its FLOPs"),
        (950, 7e7, "**yes, in cost**: accuracies can't be told apart, 86 % of its FLOPs"),
        (946, 5.9e7, "**no**: accuracies can't be told apart, 102 % of its FLOPs"),  # 4 : 0 images
        (950, 5e7, "**no**: accuracies can't be told apart, 120 % of its FLOPs"),
    ],
)
def test_verdict_says_where_blockdrop_is_beneficial(results, count_correct, flops, words):
    assert beside(count_correct, flops=flops).verdict == words
    sole = {"20": SoleResNet(accuracy=count_correct / 1000, flops=flops)}
    results = changed(
        results, baselines={"sole": sole}, correctness={"sole-20": correctness(count_correct)}
    )
    assert f"| ResNet-20 | {words} |" in page(results)


@pytest.mark.parametrize(
    ("low", "high", "reliable", "words"),
    [
        (0.7, 0.9, True, f"**no**: {UNTOLD} 0.80 times as fast"),
        (1.1, 2.0, False, f"**yes, in cost**: {UNTOLD} faster, by between 1.10 and 2.00 times"),
        (0.9, 1.1, True, f"**no**: {UNTOLD}"),  # equally fast
        (0.5, 1.5, False, f"**yes, in cost**: {UNTOLD} too noisy to compare"),  # so the FLOPs decide
    ],
)  # fmt: skip
def test_verdict_goes_by_time_where_that_is_known(low, high, reliable, words):
    speedup = Speedup(ratio=0.8, low=low, high=high, reliable=reliable)
    assert beside(950, flops=7e7, speedup=speedup).verdict.startswith(words)


def test_time_of_one_image_stands_beside_the_full_and_the_sole_resnet(results):
    fp32, bf16 = (
        replace(ANSWER, batch=1, precision=precision, winner=replace(WINNER, milliseconds=milliseconds))
        for precision, milliseconds in (("fp32", 2.25), ("bf16", 1.25))
    )
    text = page(changed(results, benchmark={"answers": [ANSWER, fp32, bf16]}))
    for cells in (
        "one image: 1.65 times as fast (95 % interval 1.50 to 1.70) | 96.00 %",
        "| imported | 3.30 |",  # every block
        "| imported + 10 + 30 | 1.25 |",  # BlockDrop, in the precision in which it is fastest
        "one image: 1.25 times as fast (95 % interval 1.20 to 1.30) | 90.00 %",
        "| 25 | 2.50 |",  # ResNet-20
    ):
        assert cells in text


@pytest.mark.parametrize(
    ("seconds", "cell"),
    [([49.2], "49"), ([49.2, 18.6, None], "49 + 19 + imported"), ([49.2, 18.6], "68 (49 + 19)"),
     ([None], "imported"), ([None, None], "imported"), ([], "imported")],
)  # fmt: skip
def test_training_time_is_a_sum_only_where_all_of_it_is_known(seconds, cell):
    times = {
        str(number): TrainingTimes(seconds=took, images_per_second=None)
        for number, took in enumerate(seconds)
    }
    assert " ".join(training_time(["0", "1", "2"], times).split()) == cell


def test_sole_resnets_that_were_trained_are_compared_in_time(results):
    text = page(results)
    assert (
        "- Batch 32, fp32, beside a ResNet-20: BlockDrop is 1.25 times as fast (95 % interval 1.20 to"
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
    assert f"Batch 32, fp32, beside a ResNet-20: {words}." in text
    assert f"| {cell} | 1.80 | fused, fp32 |" in text
    assert "1.25" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "Batch 32, fp32: beneficial, 1.65 times as fast (95 % interval 1.50 to 1.70); no "
             "slower than a ResNet-20 with every block."),
        ({"ratio": 0.9, "low": 0.8, "high": 0.95}, "**not** beneficial"),
        ({"low": 0.95}, "no difference, 1.65 times as fast (95 % interval 0.95 to 1.70); it would be "
                        "beneficial up to a keep ratio of 80 % with many different policies"),
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
    assert "second: curriculum 2000, finetune 900 (on CPU); sole-20 800 (on GPU)." in page(results)
    noisy = answered(results, speedup=replace(FASTER, reliable=False))
    assert "won back" not in page(noisy)


def test_parameters_are_listed_as_yaml(results):
    text = markdown.page(changed(results, params={"data.folder": "```\n# no heading"}), ANYWHERE)
    assert "````yaml\n" in text
    for line in (
        "resnet.mean: [0.5, 0.25, 1.0]",
        "policy_net.input_size: null",
        "augmentation.flip: true",
    ):
        assert f"\n{line}\n" in text
