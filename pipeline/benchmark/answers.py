"""What the rounds of one batch size come to: a row for each candidate, an answer for each precision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.benchmark.candidates import Candidate, fastest_first
from pipeline.benchmark.timing import Times, speedup, statistics
from pipeline.results import Agreement, Answer, BesideSole, Kind, TimingRow, Winner


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of each round, of every candidate that was timed, by label."""

    batch: int
    candidates: Mapping[str, Candidate]
    times: Mapping[str, Times]

    def seconds(self, label: str) -> float:
        """The median of a candidate's rounds."""
        return float(np.median(self.times[label]))

    def labels(self, kind: Kind, precision: str | None = None) -> list[str]:
        """Candidates of a kind (and a precision), the fastest first."""
        seconds = {label: self.seconds(label) for label in self.times}
        return fastest_first(self.candidates, seconds, kind, precision)

    def row(
        self, label: str, *, agreement: Agreement | None, ideal: float | None, peak_mib: float | None
    ) -> TimingRow:
        candidate = self.candidates[label]
        over_full = speedup(self.times[self.labels("full")[0]], self.times[label])
        if agreement is not None and not agreement.agrees:
            over_full = replace(over_full, reliable=False)
        with_all_blocks = candidate.label_with_all_blocks
        over_itself = None
        if candidate.kind == "blockdrop" and with_all_blocks in self.times:
            over_itself = self.seconds(with_all_blocks) / self.seconds(label)
        return TimingRow(
            candidate=candidate.name,
            kind=candidate.kind,
            precision=candidate.precision,
            batch=self.batch,
            time=statistics(self.times[label], self.batch),
            speedup=over_full,
            agreement=agreement,
            ideal=ideal,
            speedup_over_itself=over_itself,
            peak_mib=peak_mib,
        )

    def winner(self, precision: str, rows: Mapping[str, TimingRow]) -> str | None:
        """The fastest executor of a precision that agrees with the reference."""
        for label in self.labels("blockdrop", precision):
            agreement = rows[label].agreement
            if agreement and agreement.agrees:
                return label
        return None

    def answer(self, precision: str, rows: Mapping[str, TimingRow]) -> Answer:
        best = self.labels("full")[0]
        label = self.winner(precision, rows)
        return Answer(
            precision=precision,
            batch=self.batch,
            full_form=self.candidates[best].name,
            full_precision=self.candidates[best].precision,
            winner=None if label is None else self._winner(label, best, rows[label]),
        )

    def _winner(self, label: str, best: str, row: TimingRow) -> Winner:
        assert row.ideal is not None  # every BlockDrop row has it
        # FLOPs promise nothing of precisions, so this is beside the best form of the same one
        same_precision = self.labels("full", self.candidates[label].precision)
        share_of_ideal = None
        if same_precision:
            share_of_ideal = self.seconds(same_precision[0]) / self.seconds(label) / row.ideal
        sole = self._beside_sole(label)
        not_faster = [name for name, beside in sole.items() if beside.speedup.low >= 1]
        return Winner(
            executor=self.candidates[label].name,
            milliseconds=row.time.milliseconds,
            full_milliseconds=self.seconds(best) * 1000,
            speedup=speedup(self.times[best], self.times[label]),
            ideal=row.ideal,
            share_of_ideal=share_of_ideal,
            sole=sole,
            faster_than=not_faster[0] if not_faster else None,  # the fastest of them
        )

    def _beside_sole(self, label: str) -> dict[str, BesideSole]:
        """A candidate beside full ResNets of other depths, each in its fastest precision."""
        beside: dict[str, BesideSole] = {}
        for sole in self.labels("sole"):
            name = self.candidates[sole].name
            if name not in beside:
                beside[name] = BesideSole(
                    milliseconds=self.seconds(sole) * 1000,
                    speedup=speedup(self.times[sole], self.times[label]),
                )
        return beside


def in_words(answer: Answer) -> str:
    where, winner = f"batch {answer.batch}, {answer.precision}", answer.winner
    if winner is None:
        return f"{where}: no executor gave what the reference gives, so nothing is claimed"
    if not winner.speedup.claim:
        return f"{where}: too noisy to claim a speed-up"
    return (
        f"{where}: {winner.executor} is {winner.speedup} beside the full ResNet "
        f"({answer.full_form}, {answer.full_precision}); FLOPs say {winner.ideal:.2f}"
    )
