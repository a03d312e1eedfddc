"""Kill trainings at random moments, fail their writes, kill their server: nothing may be lost.

`make chaos`, or `python -m chaos --kills 50 --faults 8 --servers 1`. In a copy of this repository
with tiny parameters, and without the stages that train nothing, one `dvc repro` runs to its end: its
outs are the truth. Then, each in a fresh copy of that: DVC is made to forget a training, `dvc repro`
starts and is killed, and a plain `dvc repro` follows. What `chaos.checks` then finds is a loss.

Everything is drawn from `--seed` and the case's number: `--only "kill 17"` plays one case again.
Exit status: 0; 1 for a loss, or when time was up before all cases; 3 without a compiler for the faults.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chaos.cases import (
    Case,
    Fault,
    Kill,
    Outcome,
    Server,
    draw_fault,
    draw_kill,
    draw_server,
    run_fault,
    run_kill,
    run_server,
)
from chaos.home import TRAININGS, Home, TimeUpError, compile_shim, run_truth
from tools.command import Parser

LOST, NO_COMPILER = 1, 3


def draw(home: Home, seed: int, *, kills: int, faults: int, servers: int) -> list[Case]:
    """All cases, the longest first."""
    return [
        *(draw_server(number, seed, home) for number in range(1, servers + 1)),
        *(draw_fault(number, seed, home) for number in range(1, faults + 1)),
        *(draw_kill(number, seed, home) for number in range(1, kills + 1)),
    ]


def run_case(case: Case, home: Home) -> Outcome | None:
    """Run one, and keep its folder when something was lost; None when the time was up."""
    started = time.monotonic()
    try:
        if started >= home.deadline:
            raise TimeUpError
        outcome = _run(case, home)
    except TimeUpError:
        return None
    except Exception as error:  # it hangs, say: the other cases go on
        outcome = Outcome(name=case.name, stage=case.training.name, losses=[f"{error!r}; {case}"])
    outcome.seconds = time.monotonic() - started
    if not outcome.losses:
        shutil.rmtree(folder_of(outcome, home))
    return outcome


def _run(case: Case, home: Home) -> Outcome:
    if isinstance(case, Kill):
        return run_kill(case, home)
    if isinstance(case, Fault):
        return run_fault(case, home)
    assert isinstance(case, Server)
    return run_server(case, home)


def folder_of(outcome: Outcome, home: Home) -> Path:
    """Where a case had its copy and its logs."""
    return home.folder / outcome.name.replace(" ", "-")


def run_all(cases: Sequence[Case], home: Home, lanes: int, say: Callable[[str], None]) -> list[Outcome]:
    """Run the cases side by side, with a line on each."""
    outcomes = []
    with ThreadPoolExecutor(lanes) as pool:
        try:
            for done in as_completed([pool.submit(run_case, case, home) for case in cases]):
                outcome = done.result()
                if outcome is not None:
                    outcomes.append(outcome)
                    say(line_of(outcome))
                    for lost in outcome.losses:
                        say(f"    LOST: {lost}")
        except BaseException:
            home.deadline = 0  # Ctrl-C: the lanes end what they have started, and nothing new begins
            raise
    return outcomes


def line_of(outcome: Outcome) -> str:
    """One line on a case."""
    found = "LOST" if outcome.losses else "nothing lost"
    how = ", resumed" if outcome.resumed else ""
    how += "".join(f", {name} torn by DVC and mended" for name in outcome.torn)
    return f"{outcome.name}, {outcome.stage}: {outcome.what}{how}: {found}, {outcome.seconds:.0f} s"


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """How many of what, and what was lost."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome.name.split()[0]
        for kind in ("", outcome.kind, f"to {outcome.target}", f"in {outcome.stage}"):
            groups.setdefault((case, kind), []).append(outcome)
    table = Table("", "cases", "resumed", "losses")
    for (case, kind), found in sorted(groups.items()):
        lost, resumed = sum(bool(o.losses) for o in found), sum(o.resumed for o in found)
        table.add_row(f"  {kind}" if kind else f"{case}s", str(len(found)), str(resumed), str(lost))
    return table


def summary(outcomes: Sequence[Outcome], home: Home) -> str:
    """The three numbers."""
    kills = [outcome for outcome in outcomes if outcome.name.startswith("kill")]
    lost = sum(bool(outcome.losses) for outcome in outcomes)
    stages = {outcome.stage for outcome in kills}
    missed = {training.name for training in home.trainings} - stages
    hit = f"{len(stages)}, not {', '.join(sorted(missed))}" if missed else "all"
    return f"kills: {len(kills)}, stages hit: {hit}, losses: {lost}"


def verdict(cases: Sequence[Case], outcomes: Sequence[Outcome], home: Home, seed: int) -> int:
    """Say what is to be done about it; the exit status."""
    lost = [outcome for outcome in outcomes if outcome.losses]
    for outcome in lost:
        again = f'python -m chaos --seed {seed} --only "{outcome.name}"'
        print(f"{outcome.name} lost something: see {folder_of(outcome, home)}, or {again}")
    if len(outcomes) < len(cases):
        print(f"time was up after {len(outcomes)} of {len(cases)} cases; --seconds gives more")
    torn = [outcome for outcome in outcomes if outcome.torn]
    if torn:
        names = " and ".join(sorted({name for outcome in torn for name in outcome.torn}))
        print(
            f"in {len(torn)} cases DVC could not read {names}, half written when it was killed: "
            "`make repro` mends that"
        )
    if lost or len(outcomes) < len(cases):
        return LOST
    if home.library is None:
        print("left out without a C compiler (and Linux): writes that fail, kills in the middle of one")
        return NO_COMPILER
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=50)
    add("--faults", type=int, default=8, help="writes that fail")
    add("--servers", type=int, default=1, help="MLflow servers that die")
    add("--stages", nargs="+", choices=TRAININGS, default=TRAININGS, help="with those they need")
    add("--lanes", type=int, default=3, help="cases side by side")
    add("--seed", type=int, default=random.randrange(10**6))
    add(
        "--seconds",
        type=float,
        default=580,
        help="for everything; what is not done by then is a failure",
    )
    add("--keep", type=Path, help="a new folder to work in, which stays")
    add("--only", help='play one case again: "kill 17"')
    return parser.parse_args()


def main() -> int:
    """Draw the cases, run them, say what was lost."""
    asked = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored after `&`, and then below too
    began = time.monotonic()
    if asked.keep:
        asked.keep.mkdir(parents=True)
    folder = (asked.keep or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    print(f"seed {asked.seed}, in {folder}", flush=True)
    home = run_truth(folder, compile_shim(folder), asked.stages, asked.seconds)
    print(f"without any fault: {time.monotonic() - began:.0f} s", flush=True)
    faults = asked.faults if home.library else 0
    cases = draw(home, asked.seed, kills=asked.kills, faults=faults, servers=asked.servers)
    cases = [case for case in cases if asked.only in (None, case.name)]
    outcomes = run_all(cases, home, asked.lanes, lambda line: print(line, flush=True))
    Console().print(table_of(outcomes))
    print(f"{summary(outcomes, home)} ({time.monotonic() - began:.0f} s, seed {asked.seed})")
    status = verdict(cases, outcomes, home, asked.seed)
    if status != LOST and asked.keep is None:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
