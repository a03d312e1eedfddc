"""How long inference takes, measured so that nothing favours BlockDrop (docs/inference-speed.md).

All candidates take turns round by round, in rotating order, each after an unmeasured call of the same
candidate; medians; intervals by a bootstrap over the rounds.

Who fails is left out by name and reason, and so is a precision that the device would only emulate.
`seconds` is kept: from the warm-up calls it is predicted what the rounds cost, and the slowest are
dropped. (What engines compile at their first call is not counted.) What is never dropped, for each batch
size: the warm-up and MIN_ROUNDS rounds of the fastest full-ResNet form and of the fastest executor of
each precision that agrees with the reference. (Who these are, and who is slow, is by the warm-up call.)

Shapes: B images of a batch, M test images of H by W pixels, K blocks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.benchmark.answers import Comparison, in_words
from pipeline.benchmark.candidates import (
    Candidate,
    CandidateMaker,
    Settings,
    fastest_first,
    policy_network_alone,
)
from pipeline.benchmark.full_resnet_forms import COMPILED
from pipeline.benchmark.reference import Reference, checked_images
from pipeline.benchmark.rounds import Rounds, peak_mib
from pipeline.benchmark.sweep import Sweep, synthetic_policies, with_break_evens
from pipeline.benchmark.timing import (
    CALLS,
    MIN_ROUNDS,
    SLACK,
    TOO_SLOW,
    Stopwatch,
    TimeBudget,
    Times,
    reason,
    too_slow,
)
from pipeline.flops import Cost
from pipeline.inference.base import Executor, Networks
from pipeline.models.resnet import ResNet
from pipeline.results import Agreement, Kind, SweepPoint, Tables, TimingRow

WARM_UP = 0.25  # of the time that is left: the most that the warm-up of one batch size may take


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
        self.left_out: dict[str, str] = {}  # what was not measured, and why
        self.tables = Tables()  # what was, so far
        self.say: Callable[[str], None] = print
        self.tick: Callable[[float], None] = lambda _: None

    def run(
        self, say: Callable[[str], None] = print, tick: Callable[[float], None] = lambda _: None
    ) -> Tables:
        """Time all candidates, the winners under synthetic policies and by parts, and answer.

        Args:
            say: gets a line for each answer and whatever is left out; `self.tables` then holds all
                that is measured so far.
            tick: gets the seconds that are spent, every now and then.
        """
        self.say, self.tick = say, tick
        self.clock = TimeBudget(self.settings.seconds)
        extra = [
            Candidate(name=name, kind="blockdrop", precision=execute.precision, run=execute)
            for name, execute in self.extra.items()
        ]
        maker = CandidateMaker(
            networks=self.networks, full=self.full, settings=self.settings, leave_out=self.leave_out
        )
        candidates = {candidate.label: candidate for candidate in [*extra, *maker.make_all()]}
        if not candidates:
            say("nothing to time: every precision or every candidate was left out")
            return self.tables
        batches = sorted(self.settings.batch_sizes)
        try:
            checked = checked_images(self.images.shape[1], batches[-1])
            self.reference = Reference(self.networks, self.images, checked=checked)
        except Exception as error:
            self.leave_out("everything, since there is no reference to compare with", reason(error))
            return self.tables
        cells = self._warmed_up(candidates, batches)
        least = self.clock.spent + sum(cell.least for cell in cells)
        if least > self.settings.seconds:
            say(
                f"benchmark.seconds {self.settings.seconds:g} are too few: about {least:.0f} s are the "
                f"least that {MIN_ROUNDS} rounds of the best full-ResNet form and the fastest executors "
                "take"
            )
        costs = [cell.predicted for cell in cells]
        for number, cell in enumerate(cells):
            cell.measure(self.clock.share(costs[number], sum(costs[number:])))
        return self.tables

    def leave_out(self, what: str, why: str) -> None:
        if what not in self.left_out:
            self.left_out[what] = why
            self.say(f"without {what}: {why}")

    def _warmed_up(self, candidates: Mapping[str, Candidate], batches: Sequence[int]) -> list["Cell"]:
        """All candidates at each batch size, called twice; at the larger ones without the too slow."""
        cells: list[Cell] = []
        for batch in batches:
            cell = Cell(
                benchmark=self,
                candidates=candidates,
                batch=batch,
                before=cells[-1] if cells else None,
                rounds=Rounds.of(self.images, batch=batch, count=max(2, self.settings.rounds)),
            )
            cell.warm_up()
            cells.append(cell)
        return cells


@dataclass(kw_only=True)
class Cell:
    """All candidates at one batch size."""

    benchmark: Benchmark
    candidates: Mapping[str, Candidate]
    batch: int
    # the cell of the batch size before, from which the cost of the first calls is predicted
    before: "Cell | None"
    rounds: Rounds
    seconds: dict[str, float] = field(default_factory=dict)  # of a call, by label of a candidate
    # with the reference, by label of an executor
    agreements: dict[str, Agreement] = field(default_factory=dict)
    # of the sweep and the parts, by the label of an executor that may win
    after_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings, self.clock = self.benchmark.settings, self.benchmark.clock
        self.checked_batches = -(-checked_images(self.benchmark.images.shape[1]) // self.batch)
        self.stopwatch = Stopwatch(
            device=self.benchmark.device,
            leave_out=lambda name, why: self.benchmark.leave_out(f"{name} at batch {self.batch}", why),
            tick=lambda: self.benchmark.tick(self.clock.spent),
        )

    # -------------------------------------------------------------------------- what it will cost

    def warm_up(self) -> None:
        """Call all candidates twice, and learn how long a call takes."""
        calls = {label: self.rounds.on(one.run) for label, one in self.candidates.items()}
        if self.before is not None:
            cells = (self, self.before)
            images, images_before = (cell.batch * cell.rounds.repeats for cell in cells)
            scale = CALLS * images / images_before
            predicted = {label: scale * seconds for label, seconds in self.before.seconds.items()}
            limit = WARM_UP * self.clock.left
            for label in too_slow(predicted, limit, self.before.stays()):
                self.stopwatch.leave_out(label, TOO_SLOW)
                del calls[label]
        for label in [label for label in calls if self.candidates[label].name in COMPILED]:
            before = self.clock.spent
            with suppress(Exception):  # the warm-up meets it again and says so
                self.candidates[label].run(self.rounds.batches[0][0])
            self.clock.seconds += self.clock.spent - before  # compiling does not count
        self.seconds = self.stopwatch.warm_up(calls)

    def by_seconds(self, kind: Kind, precision: str | None = None) -> list[str]:
        """Labels of a kind (and a precision) that run here, by rising time of a call."""
        return fastest_first(self.candidates, self.seconds, kind, precision)

    def stays(self) -> set[str]:
        """Who is never dropped: the best full-ResNet form, and each precision's fastest that agrees."""
        return {*self.by_seconds("full")[:1], *self._likely_winners()}

    def _likely_winners(self) -> list[str]:
        """Of each precision the fastest executor that agrees with the reference, by the warm-up."""
        winners: list[str] = []
        for precision in self.settings.precisions:
            agreeing = (label for label in self.by_seconds("blockdrop", precision) if self.agrees(label))
            winners += itertools.islice(agreeing, 1)
        return winners

    def agrees(self, label: str) -> bool:
        """Whether an executor gives what the reference gives; one that fails is left out."""
        if label not in self.agreements:
            candidate = self.candidates[label]
            batches = itertools.chain.from_iterable(self.rounds.batches)
            try:
                outputs = [candidate.run(b) for b in itertools.islice(batches, self.checked_batches)]
                actions = torch.cat([output.actions for output in outputs])  # [C, K]
                logits = torch.cat([output.logits for output in outputs])  # [C, N]
                self.agreements[label] = self.benchmark.reference.agreement(
                    actions, logits, candidate.precision
                )
            except Exception as error:
                self.stopwatch.leave_out(label, reason(error))
                self.seconds.pop(label, None)
                return False
            self.stopwatch.tick()
        return self.agreements[label].agrees

    def _predicted(self, label: str) -> float:
        """Seconds of MIN_ROUNDS rounds, and of the check of an executor."""
        calls = float(CALLS * MIN_ROUNDS)
        if self.candidates[label].kind == "blockdrop" and label not in self.agreements:
            calls += self.checked_batches / self.rounds.repeats
        return calls * self.seconds[label]

    def _predicted_after(self, winner: str) -> float:
        """Seconds at most of the sweep and the parts of a winner, with MIN_ROUNDS rounds."""
        dropping = self.seconds[winner]
        all_blocks = self.seconds.get(self.candidates[winner].label_with_all_blocks, dropping)
        full = min((self.seconds[label] for label in self.by_seconds("full")), default=0.0)
        num_blocks = self.benchmark.networks.num_blocks
        policies = len(synthetic_policies(self.settings, num_blocks, self.batch))
        sweep = full + policies * max(all_blocks, dropping)
        return CALLS * (MIN_ROUNDS + 1) * (sweep + dropping)

    @property
    def predicted(self) -> float:
        """Seconds of everything here with MIN_ROUNDS rounds."""
        after = sum(self._predicted_after(label) for label in self._likely_winners())
        return sum(self._predicted(label) for label in self.seconds) + after

    @property
    def least(self) -> float:
        """Seconds of what is never dropped."""
        return sum(self._predicted(label) for label in self.stays())

    # --------------------------------------------------------------------------------- measuring

    def measure(self, seconds: float) -> None:
        predicted, tables = self.predicted, self.benchmark.tables
        self.after_seconds = {label: self._predicted_after(label) for label in self._likely_winners()}
        slack = max(1.0, seconds / predicted) if predicted else 1.0  # by which rounds may be more
        end = self.clock.spent + seconds
        comparison = self._compare(seconds, slack)
        if not comparison.labels("full"):
            self.benchmark.say(
                f"batch {self.batch}: no form of the full ResNet ran, so nothing is claimed"
            )
            return
        rows = {label: self._row(label, comparison) for label in comparison.times}
        tables.times += rows.values()
        for precision in dict.fromkeys(one.precision for one in self.candidates.values()):
            answer = comparison.answer(precision, rows)
            label = comparison.winner(precision, rows)
            if label is not None and answer.winner is not None:
                limit = min(slack * self._predicted_after(label), end - self.clock.spent)
                points = self._sweep(label, comparison.labels("full")[0], limit)
                answer = replace(answer, winner=with_break_evens(answer.winner, points))
            tables.answers.append(answer)
            self.benchmark.say(in_words(answer))

    def _compare(self, seconds: float, slack: float) -> Comparison:
        """All candidates for which there is time, on the same test images.

        The sweep and parts that come after are dropped as candidates are: the slowest goes first.
        """
        started, stays = self.clock.spent, self.stays()
        after = {self._after(label): needed for label, needed in self.after_seconds.items()}
        predicted = {label: self._predicted(label) for label in self.seconds} | after
        for label in too_slow(predicted, seconds, stays):
            self.stopwatch.leave_out(label, TOO_SLOW)
            after.pop(label, None)
            self.seconds.pop(label, None)
        seconds -= slack * sum(after.values())
        for label in self.by_seconds("blockdrop"):
            self.agrees(label)
        times: Mapping[str, Times] = self.stopwatch.interleaved_timing(
            {label: self.rounds.on(self.candidates[label].run) for label in self.seconds},
            predicted=self.seconds,
            rounds=self.settings.rounds,
            seconds=seconds - (self.clock.spent - started),
            stays=stays,
            repeats=self.rounds.repeats,
        )
        return Comparison(batch=self.batch, candidates=self.candidates, times=times)

    def _after(self, winner: str) -> str:
        return f"keep ratios and parts {self.candidates[winner].precision}"

    def _row(self, label: str, comparison: Comparison) -> TimingRow:
        candidate, device = self.candidates[label], self.benchmark.device
        agreement = ideal = peak = None
        if candidate.kind == "blockdrop":
            agreement = self.agreements[label]
            ideal = self._ideal(len(comparison.times[label]))
        if device.type == "cuda" and candidate.name != "compiled":  # it keeps its graphs
            peak = peak_mib(candidate.run, self.rounds.on(candidate.run), device)
        return comparison.row(label, agreement=agreement, ideal=ideal, peak_mib=peak)

    def _ideal(self, rounds: int) -> float:
        """How many times fewer FLOPs than the full network's, on the images of the first rounds."""
        cost = self.benchmark.cost
        actions = self.benchmark.reference.actions[self.rounds.rows[:rounds].flatten()]  # [images, K]
        return cost.full / float(cost.of(actions).mean())

    def _sweep(self, winner: str, full: str, seconds: float) -> list[SweepPoint]:
        """Add the sweep and the parts to the tables if there is time for them; the sweep's points."""
        benchmark, precision = self.benchmark, self.candidates[winner].precision
        if self._predicted_after(winner) > SLACK * max(seconds, 0):
            self.stopwatch.leave_out(self._after(winner), TOO_SLOW)
            return []
        try:
            policy = policy_network_alone(
                benchmark.networks,
                precision,
                image_size=benchmark.images.shape[1],
                most=max(self.settings.batch_sizes),
            )
            sweep = Sweep(
                winner=self.candidates[winner],
                full=self.candidates[full],
                policy=policy,
                networks=benchmark.networks,
                settings=self.settings,
                batch=self.batch,
                rounds=self.rounds,
                stopwatch=self.stopwatch,
                clock=self.clock,
            )
            points, parts = sweep.points(seconds), sweep.parts()
        except Exception as error:
            self.stopwatch.leave_out(self._after(winner), reason(error))
            return []
        benchmark.tables.sweep += points
        benchmark.tables.parts.append(parts)
        return points
