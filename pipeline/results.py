"""What evaluate, baseline and benchmark measure and the report reads: the rows of their JSON files.

Each row is a frozen dataclass: `asdict` writes it, `from_json` reads it. No computation and no I/O.
A full form, or full-ResNet form, is one way to run the ResNet with every block: eager, fused, one of our
executors with all blocks, and so on (`pipeline/benchmark/full_resnet_forms.py`).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter

Claim = Literal["number", "faster", "slower", ""]
Kind = Literal[
    "blockdrop", "full", "sole"
]  # full: the ResNet with every block; sole: another one, of another depth or pruned
Variant = Literal["few", "many"]  # of synthetic policies: few distinct ones, or one for each image
Precision = str  # fp32 or bf16

R = TypeVar("R")


def from_json(kind: type[R], content: object) -> R:
    """A row from what `json.loads` gives.

    Raises:
        pydantic.ValidationError: a key is missing or unknown, or a value is of another type.
    """
    return TypeAdapter(kind).validate_python(content)


class Row:
    """What is read has the fields of the dataclass and no others."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}


# ------------------------------------------------------------------ metrics/evaluate.json, baseline.json


@dataclass(frozen=True, kw_only=True)
class Evaluation(Row):
    """The finetuned pair on the test images; FLOPs are per image, policy network included."""

    accuracy: float
    full_accuracy: float  # of the pretrained ResNet with every block
    num_blocks: int
    blocks_mean: float
    blocks_std: float
    unique_policies: float
    effective_policies: float
    flops_mean: float
    flops_std: float
    full_flops: float  # of the pretrained ResNet
    flops_saved: float  # of these, by pruning and dropping together
    flops_saved_by_pruning: float  # 0 where nothing is pruned
    flops_saved_by_dropping: float  # of what pruning left, policy network counted
    shuffled_accuracy: float  # when each image takes another image's policy
    # of one policy for all images at no more FLOPs, chosen on the validation images
    best_single_policy_accuracy: float
    best_single_policy_validation_accuracy: float
    best_single_policy_blocks: float
    # rank correlation of the full ResNet's loss and the number of blocks, with the ends of its 95 %
    # interval; None where all images take equally many blocks
    difficulty_spearman: float | None
    difficulty_spearman_low: float | None
    difficulty_spearman_high: float | None


@dataclass(frozen=True, kw_only=True)
class FullResNet(Row):
    """The pretrained ResNet with every block."""

    accuracy: float
    loss: float
    flops: float
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class SoleResNet(Row):
    """A ResNet of another depth, trained by itself."""

    accuracy: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class StaticNetwork(Row):
    """The ResNet finetuned under a static rule."""

    accuracy: float
    flops: float
    blocks: float


@dataclass(frozen=True, kw_only=True)
class Baselines(Row):
    """The networks that BlockDrop must beat.

    Sole ResNets by depth, static ones by RULE_BLOCKS, and ensembles of the policy network with one of
    these, by sole_DEPTH or RULE_BLOCKS; there are none where the policy network does not classify. The
    pruned ResNet with every block, as `every_block`, where one was pruned.
    """

    baseline: FullResNet
    sole: dict[str, SoleResNet]
    static: dict[str, StaticNetwork]
    ensemble: dict[str, StaticNetwork] = field(default_factory=dict)
    pruned: dict[str, SoleResNet] = field(default_factory=dict)


# ------------------------------------------------------------------------ plots/benchmark/benchmark.json


@dataclass(frozen=True, kw_only=True)
class Speedup(Row):
    """How many times as fast: a ratio of medians, with the ends of its 95 % interval."""

    ratio: float
    low: float
    high: float
    reliable: bool  # the rounds are enough and the interval is narrow enough to state the ratio

    @property
    def claim(self) -> Claim:
        """What may be claimed: the number, only `faster` or `slower`, or, of noise, nothing."""
        if self.reliable:
            return "number"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else ""

    def __str__(self) -> str:
        match self.claim:
            case "number":
                interval = f"95 % interval {self.low:.2f} to {self.high:.2f}"
                return f"{self.ratio:.2f} times as fast ({interval})"
            case "faster":
                return f"faster, by between {self.low:.2f} and {self.high:.2f} times"
            case "slower":
                return f"slower, by between {1 / self.high:.2f} and {1 / self.low:.2f} times"
            case _:
                return "too noisy to compare"


@dataclass(frozen=True, kw_only=True)
class Timing(Row):
    """Milliseconds of a batch over the rounds: median and quartiles."""

    milliseconds: float
    milliseconds_25: float
    milliseconds_75: float
    images_per_second: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Agreement(Row):
    """What share of an executor's results is the fp32 reference's."""

    decisions: float  # of its decisions
    classes: float  # of its classes, under its decisions
    agrees: bool  # both are high enough for its precision


@dataclass(frozen=True, kw_only=True)
class TimingRow(Row):
    """One candidate at one batch size."""

    candidate: str
    kind: Kind
    precision: Precision
    batch: int
    time: Timing
    speedup: Speedup  # over the fastest full-ResNet form
    # of BlockDrop executors alone, as is `ideal`, the speed-up that FLOPs promise
    agreement: Agreement | None = None
    ideal: float | None = None
    speedup_over_itself: float | None = None  # over the same executor with every block
    peak_mib: float | None = None  # CUDA memory that it takes

    @property
    def claim(self) -> Claim:
        """As the speed-up's; nothing of an executor that gives other results."""
        return "" if self.agreement is not None and not self.agreement.agrees else self.speedup.claim


@dataclass(frozen=True, kw_only=True)
class SweepPoint(Row):
    """The winner's time under synthetic policies of one keep ratio, beside the fastest full form's."""

    precision: Precision
    batch: int
    executor: str
    variant: Variant
    keep_ratio: float
    full_milliseconds: float
    time: Timing
    speedup: Speedup


@dataclass(frozen=True, kw_only=True)
class Parts(Row):
    """Milliseconds of what every BlockDrop time includes, each measured alone."""

    precision: Precision
    batch: int
    executor: str
    normalisation_ms: float
    policy_network_ms: float
    index_ms: float


@dataclass(frozen=True, kw_only=True)
class BesideSole(Row):
    """BlockDrop beside the full ResNet of another depth, which takes that time."""

    milliseconds: float
    speedup: Speedup


@dataclass(frozen=True, kw_only=True)
class Winner(Row):
    """The fastest executor that agrees with the reference."""

    executor: str
    milliseconds: float
    full_milliseconds: float
    speedup: Speedup  # over the fastest full-ResNet form in any precision
    ideal: float  # what FLOPs promise
    # its speed-up over the fastest full form in its own precision, by `ideal`; None where no such form
    # was timed
    share_of_ideal: float | None
    sole: dict[str, BesideSole]  # by name, the fastest first
    faster_than: str | None  # the fastest of these that is not faster than BlockDrop
    # keep ratio up to which it is faster, with few distinct policies; None where that was not measured
    # or can't be told. `break_even_many` likewise
    break_even_few: float | None = None
    break_even_many: float | None = None

    @property
    def break_evens(self) -> dict[Variant, float]:
        """Those that are known."""
        both: dict[Variant, float | None] = {"few": self.break_even_few, "many": self.break_even_many}
        return {variant: ratio for variant, ratio in both.items() if ratio is not None}


@dataclass(frozen=True, kw_only=True)
class Answer(Row):
    """BlockDrop in one precision at one batch size, beside the fastest full-ResNet form in any."""

    precision: Precision
    batch: int
    full_form: str
    full_precision: Precision
    winner: Winner | None  # None where no executor agrees with the reference


@dataclass(kw_only=True)
class Tables(Row):
    """Everything that was timed, so far."""

    times: list[TimingRow] = field(default_factory=list)
    sweep: list[SweepPoint] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


@dataclass(kw_only=True)
class BenchmarkResult(Tables):
    """The same with where and how it was measured, and what was not."""

    machine: dict[str, str | int | None]
    settings: dict[str, Any]
    left_out: dict[str, str]
