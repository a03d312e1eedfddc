"""How long inference takes, measured so that it cannot flatter.

The same test images for everybody; contestants take turns round by round, in rotating order, each after
an unmeasured call of its own; medians; intervals by a bootstrap over the rounds. The policy network and
the normalisation are inside of every BlockDrop time. The rival is the fastest of all static forms of the
full ResNet in any of the precisions, those of our own executors included. No speed-up is claimed where
the interval includes 1 and is wide, or where an executor does not give what the reference gives.

Who fails is left out by name and reason, and so is a precision that the device would only emulate.
`seconds` is kept: from the warm-up calls it is predicted what the rounds cost, and the slowest are
dropped. What is never dropped, for each batch size: the warm-up and MIN_ROUNDS rounds of the best
static form and of the fastest executor of each precision that agrees with the reference. (Who these
are, and who is slow, is by the warm-up call.)

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pipeline.benchmark.full_resnet_forms import Classify, WholeGraph, static_forms
from pipeline.benchmark.timing import (
    CALLS,
    SLACK,
    TOO_SLOW,
    Call,
    Stopwatch,
    TimeBudget,
    break_even,
    random_policies,
    reason,
    statistics,
    too_slow,
)
from pipeline.device import computes_in_bf16, generator
from pipeline.flops import Cost
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Executor, Networks, UnavailableError
from pipeline.inference.masked import Masked
from pipeline.inference.predict import evaluation_batch
from pipeline.models.build import make_resnet
from pipeline.models.policies import greedy_actions
from pipeline.models.policy_net import average_down
from pipeline.models.resnet import ResNet
from pipeline.models.row_ops import kept_rows
from pipeline.speedup import MIN_ROUNDS, Row, Times, claim, in_words, speedup

# of the decisions, and of the classes, of the fp32 reference: bf16 turns some close ones
AGREEMENT = {"fp32": 0.999, "bf16": 0.97}
CHECKED = 256  # images, or a batch when it is more, on which results are compared with the reference's
IMAGES_A_ROUND = 32  # at least: smaller batches are repeated with other images
VARIANTS = ("few", "many")  # of synthetic policies: few distinct ones, or one for each image
ALL_BLOCKS = ", all blocks"  # of the name of an executor that runs the full ResNet
STATIC = "static"  # the rival in a sweep
WARM_UP = 0.25  # of the time that is left: the most that the warm-up of one batch size may take


Make = Callable[[], Callable[[Tensor], object]]  # of a contestant


def repeats_of(batch: int) -> int:
    """How many batches a round times together."""
    return -(-IMAGES_A_ROUND // batch)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        executors: names of pipeline.inference.EXECUTORS; those that can't run here are left out.
        keep_ratios: of synthetic policies.
        distinct_policies: how many distinct ones `few` has.
        sole_depths: depths of full ResNets that are timed beside (with random weights: time only).
        rounds: the most; fewer, but at least MIN_ROUNDS, when the time is up.
        seconds: for everything but torch.compile's compiling.
        with_compile: torch.compile among the static forms; it takes minutes.
    """

    batch_sizes: Sequence[int]
    precisions: Sequence[str]
    executors: Sequence[str]
    keep_ratios: Sequence[float]
    distinct_policies: int
    sole_depths: Sequence[int]
    rounds: int
    seconds: float
    with_compile: bool


class Reference:
    """What the fp32 networks decide and answer, layer by layer, as they were trained.

    Attributes:
        actions: [M, K], the decisions on the images, on the CPU.
    """

    def __init__(self, networks: Networks, images: Tensor, *, checked: int) -> None:
        self.execute = Masked(networks)
        parts = images.split(evaluation_batch(images.shape[1]))
        self.actions = torch.cat([self._decide(networks, part) for part in parts]).cpu()
        self.images = images[torch.arange(checked, device=images.device) % len(images)]
        rows = torch.arange(checked) % len(images)
        self.checked = self.actions[rows].to(images.device)
        self.classes = self._classes(self.images, self.checked)

    def agreement(self, actions: Tensor, logits: Tensor) -> tuple[float, float]:
        """Share of these decisions [B, K] on the checked images that are the reference's, and of the
        classes of logits [B, N] that are the reference's under these decisions.

        Apart, because where a block is a close decision two roundings may decide it differently, and the
        class is then another network's. Who asks no policy network shows in the first share, who runs
        other blocks than it says in the second.
        """
        count = len(actions)
        same = actions == self.checked[:count]
        classes = self.classes[:count].clone()
        others = ~same.all(dim=1)
        if others.any():
            classes[others] = self._classes(self.images[:count][others], actions[others])
        same_classes = logits.argmax(dim=1) == classes
        return float(same.double().mean()), float(same_classes.double().mean())

    @staticmethod
    @torch.no_grad()
    def _decide(networks: Networks, images: Tensor) -> Tensor:
        policy_net = networks.policy_net
        assert policy_net is not None
        return greedy_actions(torch.sigmoid(policy_net.eval()(networks.normalisation(images))))

    def _classes(self, images: Tensor, actions: Tensor) -> Tensor:
        size = evaluation_batch(images.shape[1])
        parts = zip(images.split(size), actions.split(size), strict=True)
        return torch.cat([self.execute(part, own).logits for part, own in parts]).argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who is measured; takes images [B, H, W, 3] uint8.

    Attributes:
        kind: `blockdrop`, `static` (the full ResNet) or `sole` (one of another depth).
    """

    name: str
    kind: str
    precision: str
    run: Callable[[Tensor], object]

    @property
    def label(self) -> str:
        """One of its own."""
        return f"{self.name} {self.precision}"


class Benchmark:
    """One pair of networks on one device.

    Args:
        networks: the ResNet and its policy network.
        full: the ResNet that is best with every block (the pretrained one), of the same shape.
        images: [M, H, W, 3] uint8 test images on the networks' device.
        cost: FLOPs of the networks.
        extra: executors by name beside those of the settings (tests put theirs here).

    Attributes:
        left_out: what was not measured, and why.
        tables: what was, so far.
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
        self.say: Callable[[str], None] = print
        self.tick: Callable[[float], None] = lambda _: None

    def run(
        self, say: Callable[[str], None] = print, tick: Callable[[float], None] = lambda _: None
    ) -> dict[str, list[Row]]:
        """The tables: `times` of every contestant, `sweep` over kept shares, `parts` of the winners'
        times, and `answers` in short. When a line is said, `self.tables` holds them so far.

        Args:
            tick: told the seconds that are spent, every now and then.
        """
        self.say, self.tick = say, tick
        self.clock = TimeBudget(self.settings.seconds)
        contestants = self._contestants()
        if not contestants:
            say("nothing to time: every precision or every contestant was left out")
            return self.tables
        batches = sorted(self.settings.batch_sizes)
        try:
            self.reference = Reference(self.networks, self.images, checked=max(CHECKED, batches[-1]))
        except Exception as error:
            self.leave_out("everything, since there is no reference to compare with", reason(error))
            return self.tables
        cells = self._warmed_up(contestants, batches)
        self._say_if_too_little(cells)
        costs = [cell.predicted for cell in cells]
        for number, cell in enumerate(cells):
            cell.measure(self.clock.share(costs[number], sum(costs[number:])))
        return self.tables

    def leave_out(self, what: str, why: str) -> None:
        """Note and say that something is not measured."""
        if what not in self.left_out:
            self.left_out[what] = why
            self.say(f"without {what}: {why}")

    def stopwatch(self, batch: int) -> Stopwatch:
        """For batches of that size."""
        return Stopwatch(
            device=self.device,
            leave_out=lambda name, why: self.leave_out(f"{name} at batch {batch}", why),
            tick=lambda: self.tick(self.clock.spent),
        )

    def rounds(self, size: int) -> "Rounds":
        """The images of every round: other ones each time, around and around the test set."""
        per_round = size * repeats_of(size)
        rounds = max(2, self.settings.rounds)
        rows = (torch.arange(rounds * per_round) % len(self.images)).view(rounds, -1, size)
        return Rounds(
            batches=[[self.images[r.to(self.device)] for r in batches] for batches in rows], rows=rows
        )

    def policy(self, precision: str) -> Callable[[Tensor], object]:
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

    def _contestants(self) -> dict[str, Contestant]:
        """Everybody who can be made, by label."""
        found = [
            Contestant(name=name, kind="blockdrop", precision=execute.precision, run=execute)
            for name, execute in self.extra.items()
        ]
        for precision in self.settings.precisions:
            if precision == "bf16" and not computes_in_bf16(self.device):
                self.leave_out(
                    "bf16", "this device has no instructions for it and would only emulate it"
                )
                continue
            for kind, makers in self._makers(precision).items():
                for name, make in makers.items():
                    of_missing = name.removesuffix(ALL_BLOCKS)
                    if f"{of_missing} {precision}" in self.left_out:
                        continue
                    run = self._made(f"{name} {precision}", make)
                    if run is not None:
                        found.append(Contestant(name=name, kind=kind, precision=precision, run=run))
        return {contestant.label: contestant for contestant in found}

    def _makers(self, precision: str) -> Mapping[str, Mapping[str, Make]]:
        """What makes the contestants of a precision, by kind and name."""
        names = self.settings.executors
        whole = [name for name in names if name != Masked.name]  # with every block it is the eager form
        forms: Mapping[str, Make] = static_forms(
            self.full, precision, with_compile=self.settings.with_compile
        )
        return {
            "blockdrop": {
                name: partial(make_executor, self.networks, name=name, precision=precision)
                for name in names
            },
            "static": {
                **forms,
                **{f"{name}{ALL_BLOCKS}": partial(self._whole, name, precision) for name in whole},
            },
            "sole": {
                f"ResNet-{depth}": partial(self._sole, depth, precision)
                for depth in self.settings.sole_depths
            },
        }

    def _made(self, label: str, make: Make) -> Callable[[Tensor], object] | None:
        try:
            return make()
        except UnavailableError as error:
            self.leave_out(label, str(error))
        except Exception as error:
            self.leave_out(label, reason(error))
        return None

    def _whole(self, name: str, precision: str) -> Classify:
        """The full ResNet by one of our executors."""
        return Full(make_executor(self.full, name=name, precision=precision))

    def _sole(self, depth: int, precision: str) -> Classify:
        """A full ResNet of another depth with random weights, by the device's best executor."""
        full = self.full.resnet
        sole = make_resnet(
            family=full.family, depth=depth, width=full.width, num_classes=full.num_classes
        )
        networks = replace(self.full, resnet=sole.to(self.device))
        return Full(make_executor(networks, precision=precision))

    def _warmed_up(self, contestants: Mapping[str, Contestant], batches: Sequence[int]) -> list["Cell"]:
        """Everybody at each batch size, called twice; at the larger ones not who is too slow for it."""
        cells: list[Cell] = []
        for batch in batches:
            before = cells[-1] if cells else None
            cell = Cell(self, contestants, batch, before)
            cell.warm_up()
            cells.append(cell)
        return cells

    def _say_if_too_little(self, cells: Sequence["Cell"]) -> None:
        least = self.clock.spent + sum(cell.least for cell in cells)
        if least > self.settings.seconds:
            self.say(
                f"benchmark.seconds {self.settings.seconds:g} are too few: about {least:.0f} s are the "
                f"least that {MIN_ROUNDS} rounds of the best static form and the fastest executors take"
            )


class Cell:
    """All contestants at one batch size.

    Args:
        before: the same at the batch size before, from which the cost of the first calls is predicted.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        contestants: Mapping[str, Contestant],
        batch: int,
        before: "Cell | None",
    ) -> None:
        self.benchmark = benchmark
        self.settings = benchmark.settings
        self.contestants = dict(contestants)
        self.batch = batch
        self.before = before
        self.rounds = benchmark.rounds(batch)
        self.stopwatch = benchmark.stopwatch(batch)
        self.images_a_call = batch * repeats_of(batch)
        self.seconds: dict[str, float] = {}  # of a call, by label
        self.checks: dict[str, tuple[float, float]] = {}  # agreement with the reference, by label
        self.extras: dict[str, float] = {}  # seconds of what comes after the duel, by who may win it

    def warm_up(self) -> None:
        """Call everybody twice, and learn how long a call takes."""
        calls = {label: self.rounds.on(one.run) for label, one in self.contestants.items()}
        if self.before is not None:
            scale = CALLS * self.images_a_call / self.before.images_a_call
            predicted = {label: scale * took for label, took in self.before.seconds.items()}
            limit = WARM_UP * self.benchmark.clock.left
            for label in too_slow(predicted, limit, self.before.stays()):
                self.stopwatch.leave_out(label, TOO_SLOW)
                del calls[label]
        for label in [label for label in calls if self.contestants[label].name == "compiled"]:
            self._compile(label)
        self.seconds = self.stopwatch.warm_up(calls)

    def _compile(self, label: str) -> None:
        """Let torch.compile compile; what that takes does not count."""
        before = self.benchmark.clock.spent
        with suppress(Exception):  # the warm-up meets it again and says so
            self.contestants[label].run(self.rounds.batches[0][0])
        self.benchmark.clock.seconds += self.benchmark.clock.spent - before

    def of(self, kind: str, precision: str | None = None) -> list[str]:
        """Labels of those who run here, of a kind (and a precision), by rising time of a call."""
        found = [
            label
            for label in self.seconds
            if self.contestants[label].kind == kind
            and precision in (None, self.contestants[label].precision)
        ]
        return sorted(found, key=lambda label: self.seconds[label])

    def stays(self) -> set[str]:
        """Who is never dropped: the best static form, and each precision's fastest that agrees."""
        found = set(self.of("static")[:1])
        for precision in self.settings.precisions:
            agreeing = (label for label in self.of("blockdrop", precision) if self.agrees(label))
            found.update([label for label in [next(agreeing, None)] if label is not None])
        return found

    def agrees(self, label: str) -> bool:
        """Whether an executor gives what the reference gives; who can't be asked is left out."""
        if label not in self.checks:
            batches = [images for batches in self.rounds.batches for images in batches]
            try:
                found = [self.contestants[label].run(images) for images in batches[: self._checked]]
                actions = torch.cat([output.actions for output in found])  # type: ignore[attr-defined]
                logits = torch.cat([output.logits for output in found])  # type: ignore[attr-defined]
                self.checks[label] = self.benchmark.reference.agreement(actions, logits)
            except Exception as error:
                self.stopwatch.leave_out(label, reason(error))
                self.seconds.pop(label, None)
                return False
            self.stopwatch.tick()
        return min(self.checks[label]) >= AGREEMENT[self.contestants[label].precision]

    @property
    def _checked(self) -> int:
        """Batches on which agreement is checked."""
        return -(-CHECKED // self.batch)

    def _predicted(self, label: str) -> float:
        """Seconds of MIN_ROUNDS rounds, and of the check of an executor."""
        calls = float(CALLS * MIN_ROUNDS)
        if self.contestants[label].kind == "blockdrop" and label not in self.checks:
            calls += self._checked / repeats_of(self.batch)
        return calls * self.seconds[label]

    def _extras(self, winner: str) -> float:
        """Seconds at most of the sweep and the parts of a winner, with MIN_ROUNDS rounds."""
        own = self.seconds[winner]
        whole = self.seconds.get(self._whole_of(winner), own)
        static = min((self.seconds[label] for label in self.of("static")), default=0.0)
        sweep = static + len(self._policies()) * max(whole, own)
        return CALLS * (MIN_ROUNDS + 1) * (sweep + own)

    def _after(self, winner: str) -> str:
        """What comes after the duel, of the winner's precision."""
        return f"kept shares and parts {self.contestants[winner].precision}"

    def _whole_of(self, winner: str) -> str:
        one = self.contestants[winner]
        return f"{one.name}{ALL_BLOCKS} {one.precision}"

    @property
    def predicted(self) -> float:
        """Seconds of everything here with MIN_ROUNDS rounds."""
        extras = sum(self._extras(label) for label in self.stays() if self._is_blockdrop(label))
        return sum(self._predicted(label) for label in self.seconds) + extras

    @property
    def least(self) -> float:
        """Seconds of what is never dropped."""
        return sum(self._predicted(label) for label in self.stays())

    def _is_blockdrop(self, label: str) -> bool:
        return self.contestants[label].kind == "blockdrop"

    def measure(self, seconds: float) -> None:
        """Fill the tables with everything of this batch size."""
        predicted, tables = self.predicted, self.benchmark.tables
        self.extras = {label: self._extras(label) for label in self.stays() if self._is_blockdrop(label)}
        more = max(1.0, seconds / predicted) if predicted else 1.0  # rounds than MIN_ROUNDS, in share
        end = self.benchmark.clock.spent + seconds
        times = self._duel(seconds, more)
        if not any(self.contestants[label].kind == "static" for label in times):
            self.benchmark.say(f"batch {self.batch}: no static form ran, so nothing is claimed")
            return
        best = min(self._times_of(times, "static"), key=lambda label: float(np.median(times[label])))
        rows = {label: self._row(label, times, best) for label in times}
        tables["times"] += rows.values()
        for precision in dict.fromkeys(one.precision for one in self.contestants.values()):
            answer = self._answer(precision, times, rows, best)
            if "executor" in answer:
                winner = f"{answer['executor']} {precision}"
                limit = more * self._extras(winner)
                answer |= self._more(winner, best, min(limit, end - self.benchmark.clock.spent))
            tables["answers"].append(answer)
            self.benchmark.say(_line(answer))

    def _duel(self, seconds: float, more: float) -> dict[str, Times]:
        """Everybody for whom there is time, on the same test images.

        What comes after it is dropped as contestants are: where it takes the longest, it goes first.
        """
        started, stays = self.benchmark.clock.spent, self.stays()
        after = {self._after(label): needed for label, needed in self.extras.items()}
        predicted = {label: self._predicted(label) for label in self.seconds} | after
        for label in too_slow(predicted, seconds, stays):
            self.stopwatch.leave_out(label, TOO_SLOW)
            after.pop(label, None)
            self.seconds.pop(label, None)
        seconds -= more * sum(after.values())
        for label in self.of("blockdrop"):
            self.agrees(label)
        calls = {label: self.rounds.on(self.contestants[label].run) for label in self.seconds}
        return self.stopwatch.take_turns(
            calls,
            predicted=self.seconds,
            rounds=self.settings.rounds,
            seconds=seconds - (self.benchmark.clock.spent - started),
            stays=stays,
            repeats=repeats_of(self.batch),
        )

    def _times_of(
        self, times: Mapping[str, Times], kind: str, precision: str | None = None
    ) -> list[str]:
        return [
            label
            for label in times
            if self.contestants[label].kind == kind
            and precision in (None, self.contestants[label].precision)
        ]

    def _row(self, label: str, times: Mapping[str, Times], best: str) -> Row:
        """A line of the table `times`."""
        one = self.contestants[label]
        row: Row = {
            "contestant": one.name,
            "kind": one.kind,
            "precision": one.precision,
            "batch": self.batch,
            **statistics(times[label], self.batch),
            **speedup(times[best], times[label]),
        }
        if one.kind == "blockdrop":
            decisions, classes = self.checks[label]
            row |= {"same_decisions": decisions, "same_classes": classes, "agrees": self.agrees(label)}
            row["reliable"] = row["reliable"] and row["agrees"]
            row["ideal"] = self._ideal(len(times[label]))
            whole = times.get(self._whole_of(label))
            if whole is not None:
                row["speedup_over_itself"] = float(np.median(whole) / np.median(times[label]))
        if self.benchmark.device.type == "cuda" and one.name != "compiled":  # it keeps its graphs
            row["peak_mib"] = peak_mib(one.run, self.rounds.on(one.run), self.benchmark.device)
        return row

    def _ideal(self, rounds: int) -> float:
        """How many times fewer FLOPs than the full network's, on the images of the first rounds."""
        benchmark = self.benchmark
        actions = benchmark.reference.actions[self.rounds.rows[:rounds].flatten()]
        return benchmark.cost.full / float(benchmark.cost.of(actions).mean())

    def _answer(
        self, precision: str, times: Mapping[str, Times], rows: Mapping[str, Row], best: str
    ) -> Row:
        """BlockDrop in a precision beside the best static form in any."""
        rival = self.contestants[best]
        answer: Row = {
            "precision": precision,
            "batch": self.batch,
            "best_static": rival.name,
            "static_precision": rival.precision,
            "reliable": False,
        }
        agreeing = [
            label for label in self._times_of(times, "blockdrop", precision) if rows[label]["agrees"]
        ]
        if not agreeing:
            return answer
        winner = min(agreeing, key=lambda label: float(np.median(times[label])))
        own = [float(np.median(times[label])) for label in self._times_of(times, "static", precision)]
        ideal = rows[winner]["ideal"]
        gained = min(own) / float(np.median(times[winner])) if own else None
        beside = self._beside(times, winner)
        slower = [name for name, row in beside.items() if row["speedup_low"] >= 1]
        return answer | {
            "executor": self.contestants[winner].name,
            **speedup(times[best], times[winner]),
            "ideal": ideal,
            # FLOPs promise nothing of precisions, so this is beside the best form of the same one
            "share_of_ideal": None if gained is None else gained / ideal,
            "milliseconds": rows[winner]["milliseconds"],
            "static_milliseconds": rows[best]["milliseconds"],
            "sole": beside,
            "faster_than": min(slower, key=lambda name: beside[name]["milliseconds"], default=None),
        }

    def _beside(self, times: Mapping[str, Times], winner: str) -> dict[str, Row]:
        """The winner beside full ResNets of other depths, each in its fastest precision."""
        found: dict[str, Row] = {}
        for label in sorted(
            self._times_of(times, "sole"), key=lambda label: float(np.median(times[label]))
        ):
            row = {"milliseconds": float(np.median(times[label]) * 1000)}
            found.setdefault(self.contestants[label].name, row | speedup(times[label], times[winner]))
        return found

    def _more(self, winner: str, best: str, seconds: float) -> Row:
        """The sweep and the parts, if there is time for them; the break-evens."""
        precision, needed = self.contestants[winner].precision, self._extras(winner)
        what = f"kept shares and parts {precision}"
        if needed > SLACK * max(seconds, 0):
            self.stopwatch.leave_out(what, TOO_SLOW)
            return {}
        try:
            policy = self.benchmark.policy(precision)
            sweep = self._sweep(winner, best, policy, seconds)
            parts = self._parts(winner, policy)
        except Exception as error:
            self.stopwatch.leave_out(what, reason(error))
            return {}
        self.benchmark.tables["sweep"] += sweep
        self.benchmark.tables["parts"].append(parts)
        return self._break_evens(sweep)

    def _policies(self) -> list[tuple[str, int]]:
        """Synthetic policies: the variant and the number of blocks, which the share is rounded to."""
        num_blocks = self.benchmark.networks.num_blocks
        kept = dict.fromkeys(round(share * num_blocks) for share in self.settings.keep_ratios)
        variants = VARIANTS if self.batch > self.settings.distinct_policies else VARIANTS[1:]
        return list(product(variants, kept))

    def _sweep(
        self, winner: str, best: str, policy: Callable[[Tensor], object], seconds: float
    ) -> list[Row]:
        """Synthetic policies: the winner's time beside the best static form's, for each share."""
        one, draw = self.contestants[winner], generator("benchmark", self.batch)
        num_blocks = self.benchmark.networks.num_blocks
        calls = {STATIC: self.rounds.on(self.contestants[best].run)}
        keys = {f"{variant} {kept}": (variant, kept) for variant, kept in self._policies()}
        for name, (variant, kept) in keys.items():
            distinct = self.settings.distinct_policies if variant == "few" else None
            policies = self.rounds.policies(num_blocks, kept=kept, distinct=distinct, draw=draw)
            calls[name] = self.rounds.forced(one.run, policy, policies)  # type: ignore[arg-type]
        times = self._all_turns(calls, self.settings.rounds, seconds)
        return [
            {
                "precision": one.precision,
                "batch": self.batch,
                "executor": one.name,
                "variant": variant,
                "keep_ratio": kept / num_blocks,
                "static_milliseconds": float(np.median(times[STATIC]) * 1000),
                **statistics(times[name], self.batch),
                **speedup(times[STATIC], times[name]),
            }
            for name, (variant, kept) in keys.items()
        ]

    def _all_turns(self, calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, Times]:
        """Seconds of each call of each round.

        Raises:
            RuntimeError: one of them failed.
        """
        failures: list[str] = []
        watch = replace(self.stopwatch, leave_out=lambda name, why: failures.append(f"{name}: {why}"))
        started = self.benchmark.clock.spent
        predicted = watch.warm_up(calls)
        left = seconds - (self.benchmark.clock.spent - started)
        times = watch.take_turns(
            calls,
            predicted=predicted,
            rounds=rounds,
            seconds=left,
            stays=calls,
            repeats=repeats_of(self.batch),
        )
        if failures:
            raise RuntimeError("; ".join(failures))
        return times

    def _break_evens(self, sweep: Sequence[Row]) -> Row:
        """By variant, from the points that are not noise."""
        found: Row = {}
        for variant in VARIANTS:
            points = [row for row in sweep if row["variant"] == variant and row["reliable"]]
            if points:
                found[f"break_even_{variant}"] = break_even(
                    [row["keep_ratio"] for row in points],
                    [row["milliseconds"] for row in points],
                    points[0]["static_milliseconds"],
                )
        return found

    def _parts(self, winner: str, policy: Callable[[Tensor], object]) -> Row:
        """Milliseconds of what every BlockDrop time includes, each measured alone."""
        one = self.contestants[winner]
        actions = one.run(self.rounds.batches[0][0]).actions  # type: ignore[attr-defined]
        calls: dict[str, Call] = {
            "normalisation": self.rounds.on(self.benchmark.networks.normalisation),
            "policy_network": self.rounds.on(policy),
            "index": self.rounds.on(lambda _: kept_rows(actions)),
        }
        times = self._all_turns(calls, MIN_ROUNDS, 0)
        milliseconds = {f"{name}_ms": float(np.median(found) * 1000) for name, found in times.items()}
        return {
            "precision": one.precision, "batch": self.batch, "executor": one.name, **milliseconds
        }  # fmt: skip


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
        self, num_blocks: int, *, kept: int, distinct: int | None, draw: torch.Generator
    ) -> list[list[Tensor]]:
        """Random policies [B, K] for every batch."""
        size = self.rows.shape[-1]
        return [
            [
                random_policies(size, num_blocks, kept=kept, distinct=distinct, draw=draw).to(
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


def peak_mib(run: Callable[[Tensor], object], call: Call, device: torch.device) -> float:
    """MiB that a first call takes, with the scratch and the graphs that later ones find made."""
    torch.cuda.synchronize(device)
    if isinstance(run, Executor | Full | WholeGraph):
        run.free()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _line(answer: Row) -> str:
    where = f"batch {answer['batch']}, {answer['precision']}"
    if "executor" not in answer:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed"
    if not claim(answer):
        return f"{where}: too noisy to claim a speed-up"
    return (
        f"{where}: {answer['executor']} is {in_words(answer)} beside the full ResNet "
        f"({answer['best_static']}, {answer['static_precision']}); FLOPs say {answer['ideal']:.2f}"
    )
