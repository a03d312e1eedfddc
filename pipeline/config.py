"""params.yaml as frozen, validated objects.

No field has a default: every value stands in params.yaml, where DVC tracks it. So this module decides
which values are allowed and never what a result is, and no stage needs to rerun when it changes.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml.constructor import ConstructorError

from pipeline.architectures import (
    CHANNEL_UNIT,
    Family,
    inner_channels,
    kept_channels,
    num_blocks,
    require_trainable,
)
from pipeline.infra.errors import UserError
from pipeline.infra.safe_io import read_bytes, short_repr, truncate

MAX_BYTES = 1 << 16  # presets have 5 KB; YAML is read at about 100 KB a second
MAX_PROBLEMS = 30  # lines of a message; a file of before the renaming has 25
NO_FILE = "import/none"  # stands for "nothing is imported": DVC needs a path that exists

# The upper bounds are far above useful values. Beyond them numbers overflow float32 or int64, or
# networks and tables exceed the memory, with an error that names no key.
Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10**5)]  # of things that each take time or memory
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Depth = Annotated[int, Field(ge=1, le=2000)]  # the same bound as for checkpoints
Width = Annotated[int, Field(ge=1, le=4096)]
PathText = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
# the shortcut pools 2x2 twice where the strided convolution rounds up: they agree on multiples of 4
Side = Annotated[int, Field(ge=8, le=512, multiple_of=4)]
Mean = Annotated[float, Field(ge=-10, le=10)]  # of pixels in [0, 1], as is the next
Deviation = Annotated[float, Field(ge=1e-3, le=1e3)]
Schedule = Literal["constant", "cosine", "step"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["sgd", "adam"]
RuleName = Literal["first", "random", "distribute"]
ExecutorName = Literal["masked", "gather", "grouped", "onednn", "cuda_graphs", "native", "triton"]
T = TypeVar("T")


RENAMED = {  # keys of older versions
    "data.validation_share": "data.validation_fraction",
    "data.test_share": "data.test_fraction",
    "pretrain.checkpoint": "checkpoints.pretrain",
    "pretrain.warmup_share": "pretrain.warmup_fraction",
    "curriculum.checkpoint": "checkpoints.curriculum",
    "curriculum.flips": "curriculum.num_flips",
    "curriculum.entropy_weight": "curriculum.entropy_coef",
    "finetune.checkpoint": "checkpoints.finetune",
    "finetune.estimator": "finetune_policy.estimator",
    "finetune.alpha": "finetune_policy.alpha",
    "finetune.entropy_weight": "finetune_policy.entropy_coef",
    "finetune.entropy_schedule": "finetune_policy.entropy_schedule",
    "finetune.diversity_weight": "finetune_policy.marginal_entropy_coef",
    "finetune.hold_epochs": "finetune_policy.frozen_epochs",
    "finetune.policy_epochs": "finetune_policy.train_epochs",
    "finetune.policy_lr": "finetune_policy.lr",
    "finetune.resnet_optimizer": "finetune.optimizer",
    "finetune.resnet_lr": "finetune.lr",
    "benchmark.kept_shares": "benchmark.keep_ratios",
    "benchmark.few_policies": "benchmark.distinct_policies",
    "sole.checkpoint": "checkpoints.sole",
    "static.checkpoint": "checkpoints.static",
    "static.kept": "static.num_kept",
}
RENAMED_EXECUTORS = {"graphed": "cuda_graphs", "persistent": "triton"}  # values of benchmark.executors


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)} names something twice; once is enough")
    return values


def _not_empty(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:  # DVC makes no stage of an empty list, and misses its files
        raise ValueError("is empty; name one at least")
    return values


Distinct = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_distinct)]
Several = Annotated[Distinct[T], AfterValidator(_not_empty)]


class ParamsError(UserError):
    """params.yaml can't be used; the message names every key, its value and the remedy."""


class Section(BaseModel):
    """Exact types, no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def section_name(section: Section) -> str:
    """What params.yaml calls a section: PolicyPretrain is policy_pretrain."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(section).__name__).lower()


class Data(Section):
    """What `prepare` writes."""

    source: Literal["digits", "cifar10", "cifar100", "imagefolder", "imagefolder_stream"]
    folder: PathText
    image_size: Side
    validation_fraction: Fraction | None
    test_fraction: Fraction | None
    split_seed: Seed

    @model_validator(mode="after")
    def _fits_the_source(self) -> Self:
        cifar = self.source in ("cifar10", "cifar100")
        if cifar and (self.validation_fraction is not None or self.test_fraction is not None):
            raise ValueError(
                "CIFAR's splits are fixed (validation: the last 5,000 training images in file order); "
                "set validation_fraction and test_fraction to null"
            )
        if cifar and self.image_size != 32:
            raise ValueError(f"CIFAR images are 32 pixels wide; set image_size {self.image_size} to 32")
        if self.source == "digits" and (self.validation_fraction is None or self.test_fraction is None):
            raise ValueError(
                "digits has no splits of its own; set validation_fraction and test_fraction"
            )
        if (self.validation_fraction or 0) + (self.test_fraction or 0) > 0.8:
            raise ValueError(
                "validation_fraction + test_fraction leave under 20 % to train on; lower them"
            )
        if (self.source == "imagefolder") != (self.folder != NO_FILE):
            raise ValueError(
                f"folder is for the source imagefolder alone: there it is the path of the images, with "
                f"any other source it is {NO_FILE}; it is {self.folder!r} with source {self.source}"
            )
        return self


class AugmentationParams(Section):
    """Random changes to training images, the same in every training stage."""

    crop_padding: Annotated[int, Field(ge=0, le=64)]
    flip: bool


class Network(Section):
    """The size of a ResNet; a policy network has the same blocks."""

    family: Family
    depth: Depth
    width: Width

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        num_blocks(self.family, self.depth)
        require_trainable(self.family, self.depth, self.width)
        return self


class ResNetParams(Network):
    """The network whose blocks are dropped, and how its input is normalised."""

    mean: Annotated[tuple[Mean, Mean, Mean], Field(strict=False)]
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)]

    @property
    def num_blocks(self) -> int:
        """K: 3n for depth 6n+2 of the family cifar."""
        return num_blocks(self.family, self.depth)


class PolicyNetParams(Network):
    """The network that looks at the image and decides."""

    input_size: Side | None
    initial_keep_prob: Fraction
    paths: Distinct[CountOrNone]

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Self:
        if len(self.paths) == 1:
            raise ValueError(f"paths {list(self.paths)} leave no choice; name two at least, or none: []")
        return self


class Pretrain(Section):
    """Training the ResNet with every block."""

    epochs: Count
    batch_size: Count
    optimizer: Optimizer
    lr: Positive
    weight_decay: NonNegative
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    schedule: Schedule
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    precision: Precision


class Finetune(Section):
    """Joint finetuning: what it does with the ResNet. Its gamma is the top-level one."""

    epochs: CountOrNone
    batch_size: Count
    optimizer: Optimizer
    lr: Positive
    distillation: Annotated[float, Field(ge=0, le=1)]
    weight_decay: NonNegative
    schedule: Schedule
    precision: Precision


class Prune(Finetune):
    """Taking inner channels from the blocks, and finetuning what is left; 0 epochs: as it is cut."""

    ratio: Annotated[float, Field(ge=0, lt=1)]
    criterion: Literal["l1", "taylor"]
    scope: Literal["uniform", "sensitivity"]


class PolicyPretrain(Pretrain):
    """Training the policy network as a classifier, if it chooses between paths; 0 epochs if not."""

    epochs: CountOrNone


class Curriculum(Section):
    """Learning the policy with a frozen ResNet."""

    gamma: NonNegative
    estimator: Literal["self_critical", "local_expectation"]
    num_flips: Few
    soft_reward: bool
    alpha: Annotated[float, Field(gt=0.5, le=1)]
    entropy: Literal["binary", "authors"]
    entropy_coef: NonNegative
    epochs_per_block: Positive
    epochs: Count
    batch_size: Count
    lr: Positive
    weight_decay: NonNegative
    schedule: Schedule
    precision: Precision


class FinetunePolicy(Section):
    """Joint finetuning: how the policy learns. `static`, which has no policy, reads nothing of it."""

    estimator: Literal["self_critical", "straight_through", "reinmax"]
    lr: Positive
    alpha: Annotated[float, Field(gt=0.5, le=1)]
    entropy_coef: NonNegative
    entropy_schedule: Literal["constant", "linear"]
    marginal_entropy_coef: NonNegative
    frozen_epochs: CountOrNone
    train_epochs: Count | None


class Checkpoints(Section):
    """Checkpoints to take instead of training, or NO_FILE; for `sole` and `static` a folder of them."""

    pretrain: PathText
    prune: PathText
    policy_pretrain: PathText
    curriculum: PathText
    finetune: PathText
    sole: PathText
    static: PathText


class Evaluate(Section):
    """How thoroughly the result is evaluated."""

    shuffles: Few
    single_policies: Few
    bootstrap: Annotated[int, Field(ge=100, le=10**6)]


class Benchmark(Section):
    """What is timed, and for how long."""

    batch_sizes: Several[Few]
    precisions: Several[Precision]
    executors: Several[ExecutorName]
    keep_ratios: Several[Annotated[float, Field(ge=0, le=1)]]
    distinct_policies: Few
    sole_depths: Distinct[Depth]
    rounds: Annotated[int, Field(ge=5, le=10**5)]
    seconds: Positive
    with_compile: bool

    @model_validator(mode="after")
    def _makes_a_line(self) -> Self:
        if len(self.keep_ratios) < 2:
            raise ValueError(f"keep_ratios {list(self.keep_ratios)} is one point; a line takes two")
        return self


class Sole(Section):
    """ResNets of other depths, every block of which runs, by pretrain's recipe."""

    depths: Several[Depth]


class Static(Section):
    """Rules that drop blocks without looking at the image, finetuned by the recipe of `finetune`."""

    rules: Several[RuleName]
    num_kept: Several[Count]


class Params(Section):
    """All of params.yaml."""

    gamma: NonNegative
    block_cost: Literal["equal", "flops"]
    seed: Seed
    data: Data
    augmentation: AugmentationParams
    resnet: ResNetParams
    policy_net: PolicyNetParams
    checkpoints: Checkpoints
    pretrain: Pretrain
    prune: Prune
    policy_pretrain: PolicyPretrain
    curriculum: Curriculum
    finetune: Finetune
    finetune_policy: FinetunePolicy
    evaluate: Evaluate
    benchmark: Benchmark
    sole: Sole
    static: Static

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        size = self.policy_net.input_size
        if size is not None and size > self.data.image_size:
            raise ValueError(
                f"policy_net.input_size {size} is more than data.image_size {self.data.image_size}; "
                "lower it, or null for the image's own size"
            )
        if self.augmentation.crop_padding >= self.data.image_size:
            raise ValueError(
                f"augmentation.crop_padding {self.augmentation.crop_padding} is as large as the image "
                f"(data.image_size {self.data.image_size}); lower it"
            )
        self._check_pruning()
        self._check_paths()
        needed = (self.resnet.num_blocks - 1) * self.curriculum.epochs_per_block + 1
        learnt = self.checkpoints.curriculum == NO_FILE and not self.policy_net.paths
        if self.curriculum.epochs < needed and learnt:
            raise ValueError(
                f"curriculum.epochs {self.curriculum.epochs} end before the first of the "
                f"{self.resnet.num_blocks} blocks is active; with epochs_per_block "
                f"{self.curriculum.epochs_per_block} it takes {math.ceil(needed)} epochs or more"
            )
        self._check_policy_epochs()
        self._check_other_networks()
        streamed = self.data.source == "imagefolder_stream"
        if streamed and self.augmentation.crop_padding:
            raise ValueError(
                f"augmentation.crop_padding {self.augmentation.crop_padding} is for images of one size; "
                "with data.source imagefolder_stream, whose crops are of random area, set it to 0"
            )
        return self

    def _check_pruning(self) -> None:
        ratio, resnet = self.prune.ratio, self.resnet
        blocks = inner_channels(resnet.family, resnet.depth, resnet.width)
        channels = sorted({count for block in blocks for count in block})
        listing = ", ".join(map(str, channels))
        if ratio and all(kept_channels(count, ratio) == count for count in channels):
            raise ValueError(
                f"prune.ratio {ratio:g} takes none of the {listing} channels inside the blocks "
                f"of the stages, since multiples of {CHANNEL_UNIT} are kept; raise it, or 0 for none"
            )

    def _check_paths(self) -> None:
        paths, blocks = self.policy_net.paths, self.resnet.num_blocks
        if paths and max(paths) > blocks:
            raise ValueError(
                f"policy_net.paths {list(paths)} keep more than the {blocks} blocks of resnet.depth "
                f"{self.resnet.depth}; name numbers from 0 to {blocks}"
            )
        trained = self.policy_pretrain.epochs > 0
        if paths and not trained and self.checkpoints.policy_pretrain == NO_FILE:
            raise ValueError(
                f"policy_net.paths {list(paths)} need a policy network that classifies; set "
                "policy_pretrain.epochs to 1 or more, or checkpoints.policy_pretrain"
            )
        if trained and not paths:
            raise ValueError(
                f"policy_pretrain.epochs {self.policy_pretrain.epochs} train a classifier that nothing "
                "uses; set policy_net.paths, or the epochs to 0"
            )
        size = self.policy_net.input_size
        if paths and size not in (None, self.data.image_size):
            raise ValueError(
                f"policy_net.input_size {size} is for policies without paths; set it to null"
            )

    def _check_policy_epochs(self) -> None:
        epochs, policy = self.finetune.epochs, self.finetune_policy
        if not epochs:  # nothing is trained: both networks are taken as they are
            return
        remaining = epochs - policy.frozen_epochs
        if remaining < 1:
            raise ValueError(
                f"finetune_policy.frozen_epochs {policy.frozen_epochs} leave none of finetune.epochs "
                f"{epochs} for the policy; lower them, 0 for none"
            )
        if policy.train_epochs is not None and policy.train_epochs > remaining:
            after = f" after frozen_epochs {policy.frozen_epochs}" if policy.frozen_epochs else ""
            raise ValueError(
                f"finetune_policy.train_epochs {policy.train_epochs} are more than finetune.epochs "
                f"{epochs}{after}; lower them, or null for all epochs"
            )

    def _check_other_networks(self) -> None:
        depth, blocks = self.resnet.depth, self.resnet.num_blocks
        depths_of = {
            "benchmark.sole_depths": self.benchmark.sole_depths,
            "sole.depths": self.sole.depths,
        }
        for key, depths in depths_of.items():
            for other in depths:
                try:
                    num_blocks(self.resnet.family, other)
                except ValueError as error:
                    raise ValueError(f"{key}: {error} (resnet.family {self.resnet.family})") from None
        for other in self.sole.depths:  # trained; those of the benchmark are not
            try:
                require_trainable(self.resnet.family, other, self.resnet.width)
            except ValueError as error:
                raise ValueError(f"sole.depths: resnet.{error}, or name other depths") from None
        if depth in self.sole.depths:
            raise ValueError(
                f"sole.depths {list(self.sole.depths)} names resnet.depth {depth}, which pretrain "
                "trains already; name other depths"
            )
        if max(self.static.num_kept) >= blocks:
            raise ValueError(
                f"static.num_kept {list(self.static.num_kept)} leaves nothing to drop of the {blocks} "
                f"blocks of resnet.depth {depth}; name numbers from 1 to {blocks - 1}"
            )

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key, as params.yaml has it (for logging)."""
        return dict(flatten(self.model_dump()))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested sections under its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values, as DVC reads them, and no key twice.

    PyYAML itself reads YAML 1.1, in which 1e-05 (as `dvc exp run -S` writes it) is a text, 010 is eight
    and `off` is false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The keys with their values, those that `<<` takes over among them."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in (_STRING, _MERGE):
                raise ConstructorError(None, None, "this is no name of a parameter", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1 go
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
for _kind, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": "<<",
}.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), None)


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        ParamsError: it is missing, is no YAML mapping, or holds a key or value that can't be used.
    """
    return check(read(path), path)


def read(path: Path | str) -> dict[str, Any]:
    """The keys and values of a file of parameters, not checked.

    Raises:
        ParamsError: it is missing, or no YAML mapping.
    """
    path = Path(path)
    try:
        content = yaml.load(read_bytes(path, MAX_BYTES).decode(), Loader)
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; {_WRITE_ONE}") from None
    except OSError as error:
        raise ParamsError(f"{path} can't be read ({error.strerror}); {_WRITE_ONE}") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ParamsError(*f"{path} is no valid YAML: {error}; correct it there".split("\n")) from None
    except Exception as error:  # PyYAML's on a value that is not what its tag says, or nested too deeply
        raise ParamsError(
            f"{path} holds a value that can't be read ({truncate(repr(error))}); correct it there, or "
            f"{_WRITE_ONE}"
        ) from None
    if not isinstance(content, dict):
        raise ParamsError(f"{path} holds {type(content).__name__}, not keys with values; {_WRITE_ONE}")
    return content


def check(content: Mapping[str, Any], path: Path | str) -> Params:
    """The parameters that a file holds.

    Raises:
        ParamsError: a key or value can't be used.
    """
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = [truncate(explain(item)) for item in _without_consequences(error.errors())]
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more; {_WRITE_ONE}"]
    raise ParamsError(f"{path} can't be used, and nothing was run:", *(f"  - {p}" for p in problems))


_WRITE_ONE = "`make preset NAME=digits` writes one"


def _without_consequences(errors: Sequence[Any]) -> list[Any]:
    """Without keys and sections that are missing because they are there under their old names."""
    present = {_key(error) for error in errors if error["type"] == "extra_forbidden"}
    new_keys = [f"{new}." for old, new in RENAMED.items() if old in present]

    def is_renamed(key: str) -> bool:
        return any(new.startswith(f"{key}.") for new in new_keys)

    return [error for error in errors if error["type"] != "missing" or not is_renamed(_key(error))]


def _key(error: Any) -> str:
    """The dotted key of a problem, without the places in a list."""
    return ".".join(part for part in error["loc"] if isinstance(part, str))


def explain(error: Any) -> str:
    """One line for one problem: key, value, what is wrong, what to do."""
    key, kind, value = _key(error), error["type"], error["input"]
    if kind == "extra_forbidden":
        if key in RENAMED:
            return f"{key}: renamed; use {RENAMED[key]}"
        *sections, name = error["loc"]
        near = difflib.get_close_matches(name, _names_in(sections), n=1)
        return f"{key}: no such key; " + (
            f"did you mean {'.'.join([*sections, near[0]])}?" if near else "remove it"
        )
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return f"{key}: is {short_repr(list(value))}, but it takes 3 numbers, one for each channel"
    if kind == "missing":
        return f"{key}: missing; add it (presets/digits.yaml has every key with a comment)"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind == "model_type":
        return f"{key}: is {short_repr(value)}, but it is a section: give it its keys and values"
    if isinstance(value, str) and value in RENAMED_EXECUTORS and key == "benchmark.executors":
        return f"{key}: {value} is renamed; use {RENAMED_EXECUTORS[value]}"
    message = error["msg"][0].lower() + error["msg"][1:].replace("Input ", "it ")
    shown = "a section" if isinstance(value, dict) else short_repr(value)
    advice = ""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        advice = " (write a number without quotes, and without zeros in front)"
    return f"{key}: is {shown}, but {message.replace('input ', 'it ')}{advice}"


def _names_in(sections: Sequence[str]) -> list[str]:
    """The keys that may stand in a section."""
    model: Any = Params
    for section in sections:
        model = model.model_fields[section].annotation
    return list(model.model_fields)
