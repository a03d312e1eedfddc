"""How long inference takes, measured so that it cannot flatter.

The same test images for everybody; contestants take turns round by round, in rotating order, each after
an unmeasured call of its own; medians; intervals by a bootstrap over the rounds. The policy network and
the normalisation are inside of every BlockDrop time. The rival is the fastest of all static forms of the
full ResNet, those of our own executors included. No speed-up is claimed where the interval is too wide
or where an executor does not give what the reference gives.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cost import Cost
from pipeline.executors.base import Executor, Networks, UnavailableError
from pipeline.executors.masked import Masked
from pipeline.executors.static import Classify, WholeGraph, static_forms
from pipeline.inference import evaluation_batch, make_executor
from pipeline.policy_net import average_down
from pipeline.resnet import ResNet, kept_rows, make_resnet
from pipeline.runtime import generator
from pipeline.timing import (
    Call,
    Clock,
    Row,
    Times,
    break_even,
    millijoules,
    some_policies,
    speedup,
    statistics,
    take_turns,
)

# of the decisions, and of the classes, of the fp32 reference: bf16 turns some close ones
AGREEMENT = {"fp32": 0.999, "bf16": 0.97}
CHECKED = 256  # images, or a batch when it is more, on which results are compared with the reference's
IMAGES_A_ROUND = 32  # at least: smaller batches are repeated with other images
VARIANTS = ("few", "many")  # of synthetic policies: few distinct ones, or one for each image


def repeats_of(batch: int) -> int:
    """How many batches a round times together."""
    return -(-IMAGES_A_ROUND // batch)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        executors: names of pipeline.inference.EXECUTORS; those that can't run here are left out.
        kept_shares: of synthetic policies.
        few_policies: how many distinct ones `few` has.
        sole_depths: depths of full ResNets that are timed beside (with random weights: time only).
        rounds: the most; fewer, but at least MIN_ROUNDS, when the time is up.
        seconds: for everything.
        with_compile: torch.compile among the static forms; it takes minutes.
    """

    batch_sizes: Sequence[int]
    precisions: Sequence[str]
    executors: Sequence[str]
    kept_shares: Sequence[float]
    few_policies: int
    sole_depths: Sequence[int]
    rounds: int
    seconds: float
    with_compile: bool


def agreement(execute: Executor, reference: Executor, batches: Sequence[Tensor]) -> tuple[float, float]:
    """Share of the reference's decisions that are the same, and of its classes under these decisions.

    Apart, because where a block is a close decision two roundings may decide it differently, and the
    class is then another network's. Who asks no policy network shows in the first share, who runs other
    blocks than it says in the second.
    """
    found = [execute(images) for images in batches]
    decisions = [reference(images).actions for images in batches]
    classes = [
        reference(images, output.actions).logits.argmax(dim=1)
        for images, output in zip(batches, found, strict=True)
    ]
    same_decisions = torch.cat([output.actions for output in found]) == torch.cat(decisions)
    same_classes = torch.cat([output.logits.argmax(dim=1) for output in found]) == torch.cat(classes)
    return float(same_decisions.double().mean()), float(same_classes.double().mean())


class Benchmark:
    """One pair of networks on one device.

    Args:
        networks: the ResNet and its policy network.
        full: the ResNet that is best with every block (the pretrained one), of the same shape.
        images: [M, H, W, 3] uint8 test images on the networks' device.
        cost: FLOPs of the networks.
        extra: executors by name beside those of the settings (tests put theirs here).
    """

    def __init__(
        self,
        networks: Networks,
        *,
        full: ResNet,
        images: Tensor,
        cost: Cost,
        settings: Settings,
        extra: Mapping[str, Executor] | None = None,
    ) -> None:
        self.networks = networks
        self.full = Networks(resnet=full, policy_net=None, normalisation=networks.normalisation)
        self.images = images
        self.cost = cost
        self.settings = settings
        self.extra = dict(extra or {})
        self.device = networks.device
        self.left_out: dict[str, str] = {}
        self.tables: dict[str, list[Row]] = {"times": [], "sweep": [], "answers": [], "parts": []}
        execute = make_executor(networks)
        self.flops = torch.cat(
            [
                cost.of(execute(part).actions).cpu()
                for part in images.split(evaluation_batch(images.shape[1]))
            ]
        )

    def run(self, say: Callable[[str], None] = print) -> dict[str, list[Row]]:
        """The tables: `times` of every contestant, `sweep` over kept shares, `parts` of the winners'
        times, and `answers` in short. When a line is said, `self.tables` holds them so far.
        """
        tables, settings = self.tables, self.settings
        cells = [(p, b) for p in settings.precisions for b in sorted(settings.batch_sizes)]
        clock = Clock(settings.seconds, 2 * len(cells))
        prepared = {precision: self._contestants(precision) for precision in settings.precisions}
        for precision, batch in cells:
            contestants = prepared[precision]
            times, rows = self._duel(contestants, precision, batch, clock.next_share())
            best = contestants.best_static(times)
            rival = times[best]
            winner = min(
                (name for name in contestants.dynamic if rows[name]["agrees"]),
                key=lambda name: float(np.median(times[name])),
                default=None,
            )
            answer: Row = {"precision": precision, "batch": batch, "best_static": best}
            if winner is not None:
                answer |= self._answer(contestants, times, rows, winner, rival)
                answer |= self._energy(contestants, winner, best, batch)
                sweep = self._sweep(contestants, winner, best, precision, batch, clock.next_share())
                tables["sweep"] += sweep
                answer |= self._break_evens(sweep)
                tables["parts"].append(self._parts(contestants, winner, precision, batch))
            else:
                answer["reliable"] = False
            tables["times"] += rows.values()
            tables["answers"].append(answer)
            say(_line(answer))
        return tables

    def _contestants(self, precision: str) -> "Contestants":
        dynamic: dict[str, Executor] = {}
        whole: dict[str, Classify] = {}
        for name in self.settings.executors:
            try:
                dynamic[name] = make_executor(self.networks, name=name, precision=precision)
                if name != Masked.name:  # with every block it is the eager form
                    whole[f"{name}, all blocks"] = Full(
                        make_executor(self.full, name=name, precision=precision)
                    )
            except UnavailableError as error:
                self.left_out[f"{name} {precision}"] = str(error)
                dynamic.pop(name, None)
        return Contestants(
            dynamic=dynamic | self.extra,
            static=static_forms(self.full, precision, with_compile=self.settings.with_compile) | whole,
            sole=self._sole(precision),
            policy=self._policy(precision),
        )

    def _sole(self, precision: str) -> dict[str, Classify]:
        """Full ResNets of other depths with random weights, by the device's best executor."""
        full = self.full.resnet
        found: dict[str, Classify] = {}
        for depth in self.settings.sole_depths:
            sole = make_resnet(
                family=full.family, depth=depth, width=full.width, num_classes=full.num_classes
            )
            networks = replace(self.full, resnet=sole.to(self.device))
            found[f"ResNet-{depth}"] = Full(make_executor(networks, precision=precision))
        return found

    def _policy(self, precision: str) -> Callable[[Tensor], object]:
        """The policy network alone, normalisation included, by the device's best executor."""
        policy_net = self.networks.policy_net
        assert policy_net is not None
        normalisation = self.networks.normalisation
        alone = Networks(resnet=policy_net.features, policy_net=None, normalisation=normalisation)
        execute = make_executor(alone, precision=precision)
        size = policy_net.input_size
        if size is None or size == self.images.shape[1]:
            return execute
        most = max(self.settings.batch_sizes)
        every = torch.ones(most, alone.num_blocks, dtype=torch.bool, device=self.device)

        def run(images: Tensor) -> Tensor:
            inputs = average_down(normalisation(images), size)
            return execute.classify(inputs, every[: len(images)])

        return run

    def _rounds(self, size: int) -> "Rounds":
        """The images of every round: other ones each time, around and around the test set."""
        per_round = size * repeats_of(size)
        rounds = max(2, self.settings.rounds)
        rows = (torch.arange(rounds * per_round) % len(self.images)).view(rounds, -1, size)
        return Rounds(
            batches=[[self.images[r.to(self.device)] for r in batches] for batches in rows], rows=rows
        )

    def _duel(
        self, contestants: "Contestants", precision: str, batch: int, seconds: float
    ) -> tuple[dict[str, Times], dict[str, Row]]:
        """Everybody on the same test images."""
        rounds = self._rounds(batch)
        calls = contestants.calls(rounds)
        times = self._take_turns(calls, batch, seconds)
        checked = [images for batches in rounds.batches for images in batches][: -(-CHECKED // batch)]
        reference = Masked(self.networks)
        flops = self.flops[rounds.rows.flatten()].mean()
        rival = times[contestants.best_static(times)]
        rows = {}
        for name, found in times.items():
            row: Row = {
                "contestant": name,
                "kind": contestants.kind(name),
                "precision": precision,
                "batch": batch,
                **statistics(found, batch),
                **speedup(rival, found),
            }
            if name in contestants.dynamic:
                decisions, classes = agreement(contestants.dynamic[name], reference, checked)
                agrees = min(decisions, classes) >= AGREEMENT[precision]
                row |= {"same_decisions": decisions, "same_classes": classes, "agrees": agrees}
                row["ideal"] = self.cost.full / float(flops)
                own_full = times.get(f"{name}, all blocks")
                if own_full is not None:
                    row["speedup_over_itself"] = float(np.median(own_full) / np.median(found))
                if not agrees:
                    row["reliable"] = False
            if self.device.type == "cuda" and name != "compiled":  # which keeps its graphs to itself
                row["peak_mib"] = self._peak_memory(contestants.everybody[name], calls[name])
            rows[name] = row
        return times, rows

    def _take_turns(self, calls: Mapping[str, Call], batch: int, seconds: float) -> dict[str, Times]:
        return take_turns(
            calls,
            rounds=self.settings.rounds,
            seconds=seconds,
            device=self.device,
            repeats=repeats_of(batch),
        )

    def _peak_memory(self, run: Callable[[Tensor], object], call: Call) -> float:
        """MiB that a first call takes, with the scratch and the graphs that later ones find made."""
        torch.cuda.synchronize(self.device)
        if isinstance(run, Executor | Full | WholeGraph):
            run.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call(0)
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def _answer(
        self,
        contestants: "Contestants",
        times: dict[str, Times],
        rows: dict[str, Row],
        winner: str,
        rival: Times,
    ) -> Row:
        found = speedup(rival, times[winner])
        ideal = rows[winner]["ideal"]
        fastest = statistics(times[winner], 1)["milliseconds"]
        slower = [name for name in contestants.sole if np.median(times[name]) * 1000 >= fastest]
        return {
            "executor": winner,
            **found,
            "ideal": ideal,
            "share_of_ideal": found["speedup"] / ideal,
            "milliseconds": fastest,
            "static_milliseconds": statistics(rival, 1)["milliseconds"],
            "faster_than": slower[0] if slower else None,
        }

    def _energy(self, contestants: "Contestants", winner: str, best: str, batch: int) -> Row:
        images = self._rounds(batch).batches[0][0]
        own = millijoules(lambda: contestants.dynamic[winner](images), batch, self.device)
        rival = millijoules(lambda: contestants.static[best](images), batch, self.device)
        return {"millijoules": own, "static_millijoules": rival}

    def _sweep(
        self,
        contestants: "Contestants",
        winner: str,
        best: str,
        precision: str,
        batch: int,
        seconds: float,
    ) -> list[Row]:
        """Synthetic policies: the winner's time beside the best static form's, for each share."""
        execute, policy = contestants.dynamic[winner], contestants.policy
        rounds = self._rounds(batch)
        draw = generator("benchmark", batch)
        calls = {"static": rounds.on(contestants.static[best])}
        keys: dict[str, tuple[str, float]] = {}
        for variant in VARIANTS if batch > self.settings.few_policies else VARIANTS[1:]:
            for share in self.settings.kept_shares:
                distinct = self.settings.few_policies if variant == "few" else None
                policies = rounds.policies(
                    self.networks.num_blocks, kept_share=share, distinct=distinct, draw=draw
                )
                name = f"{variant} {share:g}"
                keys[name] = (variant, share)
                calls[name] = rounds.forced(execute, policy, policies)
        times = self._take_turns(calls, batch, seconds)
        return [
            {
                "precision": precision,
                "batch": batch,
                "executor": winner,
                "variant": variant,
                "kept_share": share,
                "static_milliseconds": float(np.median(times["static"]) * 1000),
                **statistics(times[name], batch),
                **speedup(times["static"], times[name]),
            }
            for name, (variant, share) in keys.items()
        ]

    def _break_evens(self, sweep: list[Row]) -> Row:
        found: Row = {}
        for variant in VARIANTS:
            points = [row for row in sweep if row["variant"] == variant]
            if len(points) > 1:
                found[f"break_even_{variant}"] = break_even(
                    [row["kept_share"] for row in points],
                    [row["milliseconds"] for row in points],
                    points[0]["static_milliseconds"],
                )
        return found

    def _parts(self, contestants: "Contestants", winner: str, precision: str, batch: int) -> Row:
        """Milliseconds of what every BlockDrop time includes, each measured alone."""
        rounds = self._rounds(batch)
        actions = contestants.dynamic[winner](rounds.batches[0][0]).actions
        calls: dict[str, Call] = {
            "normalisation": rounds.on(self.networks.normalisation),
            "policy_network": rounds.on(contestants.policy),
            "index": rounds.on(lambda _: kept_rows(actions)),
        }
        times = self._take_turns(calls, batch, 0)
        milliseconds = {f"{name}_ms": float(np.median(found) * 1000) for name, found in times.items()}
        return {"precision": precision, "batch": batch, "executor": winner, **milliseconds}


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The images of every round, in one batch or, if it is small, in several: images differ in cost.

    Attributes:
        batches: [rounds][repeats], each [B, H, W, 3] uint8.
        rows: [rounds, repeats, B], which test images they are.
    """

    batches: list[list[Tensor]]
    rows: Tensor

    def on(self, run: Callable[[Tensor], object]) -> Call:
        """Run it on all batches of the round."""

        def call(number: int) -> None:
            for images in self.batches[number]:
                run(images)

        return call

    def policies(
        self, num_blocks: int, *, kept_share: float, distinct: int | None, draw: torch.Generator
    ) -> list[list[Tensor]]:
        """Random policies [B, K] for every batch."""
        size = self.rows.shape[-1]
        return [
            [
                some_policies(size, num_blocks, kept_share=kept_share, distinct=distinct, draw=draw).to(
                    images.device
                )
                for images in batches
            ]
            for batches in self.batches
        ]

    def forced(
        self, execute: Executor, policy: Callable[[Tensor], object], policies: list[list[Tensor]]
    ) -> Call:
        """Run the policy network, then the ResNet under other actions than it chose.

        The images are normalised twice so; the real executor does it once and is that much faster.
        """

        def call(number: int) -> None:
            for images, actions in zip(self.batches[number], policies[number], strict=True):
                policy(images)
                execute(images, actions)

        return call


@dataclass(frozen=True, kw_only=True)
class Contestants:
    """Who is measured, by name; all take images [B, H, W, 3] uint8."""

    dynamic: dict[str, Executor]
    static: dict[str, Classify]
    sole: dict[str, Classify]
    policy: Callable[[Tensor], object]

    @property
    def everybody(self) -> dict[str, Callable[[Tensor], object]]:
        """All of them; no two have one name."""
        return {**self.static, **self.sole, **self.dynamic}

    def calls(self, rounds: "Rounds") -> dict[str, Call]:
        """Each on the images of the round."""
        return {name: rounds.on(run) for name, run in self.everybody.items()}

    def kind(self, name: str) -> str:
        """`blockdrop`, `static` (the full ResNet) or `sole` (one of another depth)."""
        return "blockdrop" if name in self.dynamic else "static" if name in self.static else "sole"

    def best_static(self, times: Mapping[str, Times]) -> str:
        """The full ResNet's fastest form."""
        return min(self.static, key=lambda name: float(np.median(times[name])))


@dataclass(frozen=True)
class Full:
    """An executor that runs every block of a ResNet; logits alone."""

    execute: Executor

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, N] of images [B, H, W, 3] uint8."""
        return self.execute(images).logits

    def free(self) -> None:
        """Give back what calls have left on the device."""
        self.execute.free()


def _line(answer: Row) -> str:
    where = f"batch {answer['batch']}, {answer['precision']}"
    if "executor" not in answer:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed"
    if not answer["reliable"]:
        return f"{where}: too noisy to claim a speed-up"
    return (
        f"{where}: {answer['executor']} is {answer['speedup']:.2f} times as fast as the full ResNet "
        f"({answer['best_static']}); FLOPs say {answer['ideal']:.2f}"
    )
