"""Figures of times show what was measured, and make hollow what may not be claimed."""

from dataclasses import replace

import pytest

from pipeline.benchmark import figures
from pipeline.results import Speedup, SweepPoint, Timing, TimingRow, Variant

pytestmark = pytest.mark.filterwarnings("error")  # of layouts that fail, and of missing glyphs

TITLE = "ResNet-110, CPU, 2 threads"
EXECUTORS = ("masked", "gather", "grouped", "cuda_graphs", "native", "triton")
VARIANTS: tuple[Variant, ...] = ("few", "many")


def took(milliseconds: float) -> Timing:
    return Timing(
        milliseconds=milliseconds,
        milliseconds_25=milliseconds,
        milliseconds_75=milliseconds,
        images_per_second=1000 / milliseconds,
        rounds=5,
    )


def timed(candidate: str, batch: int, precision: str, ratio: float, reliable: bool = True) -> TimingRow:
    return TimingRow(
        candidate=candidate,
        kind="blockdrop",
        precision=precision,
        batch=batch,
        time=took(1),
        speedup=Speedup(ratio=ratio, low=min(0.9, ratio), high=max(1.2, ratio), reliable=reliable),
        ideal=2.5,
    )


def swept(batches: tuple[int, ...], precisions: tuple[str, ...]) -> list[SweepPoint]:
    return [
        SweepPoint(
            precision=precision,
            batch=batch,
            executor="native",
            variant=variant,
            keep_ratio=ratio,
            full_milliseconds=0.8 * batch,
            time=took(batch * ratio),
            speedup=Speedup(ratio=0.8 / ratio, low=0.9, high=1.6, reliable=batch != 32),
        )
        for batch in batches
        for precision in precisions
        for variant in VARIANTS
        for ratio in (0.2, 0.6, 1.0)
    ]


@pytest.mark.parametrize(
    ("executors", "batches", "precisions"),
    [
        (EXECUTORS, (1, 32, 128, 1024), ("fp32", "bf16")),
        (("native",), (1,), ("fp32",)),
    ],
)
def test_timing_figures_in_every_case(tmp_path, drawn, executors, batches, precisions):
    times = [
        timed(name, batch, precision, 0.3 * (number + 1), reliable=batch != 32)
        for number, name in enumerate(executors)
        for batch in batches
        for precision in precisions
    ]
    times.append(replace(times[0], kind="full", candidate="eager"))
    figures.speedups(tmp_path / "times.png", times=times, title=TITLE)
    drawn.check(tmp_path / "times.png")
    words = drawn.words.splitlines()
    assert set(executors) <= set(words)
    assert "eager" not in words
    assert ("no claim" in drawn.words) == (32 in batches)
    figures.break_evens(tmp_path / "sweep.png", sweep=swept(batches, precisions), title=TITLE)
    drawn.check(tmp_path / "sweep.png")
    assert ("too noisy to compare" in drawn.words) == (32 in batches)


def test_break_evens_makes_noisy_points_hollow(tmp_path, drawn):
    figures.break_evens(tmp_path / "figure.png", sweep=swept((1, 32), ("fp32",)), title=TITLE)
    quiet, noisy = drawn.figure.axes[:2]
    assert not [line for line in quiet.lines if line.get_markerfacecolor() == "white"]
    hollow = [line for line in noisy.lines if line.get_markerfacecolor() == "white"]
    assert sorted(line.get_xdata()[0] for line in hollow) == [20, 20, 60, 60, 100, 100]


def test_speedups_allow_an_interval_beside_its_median(tmp_path, drawn):
    outside = Speedup(ratio=2.0, low=2.1, high=2.3, reliable=True)
    row = replace(timed("native", 1, "fp32", 2.0), speedup=outside)
    figures.speedups(tmp_path / "figure.png", times=[row], title=TITLE)
    drawn.check(tmp_path / "figure.png")


@pytest.mark.parametrize("name", ["speedups", "break_evens"])
def test_timing_figure_is_the_same_bytes_again(tmp_path, name):
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        if name == "speedups":
            figures.speedups(path, times=[timed("native", 1, "fp32", 2.0)], title=TITLE)
        else:
            figures.break_evens(path, sweep=swept((1,), ("fp32",)), title=TITLE)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
