"""Kill trainings at random moments, fail their writes, kill their server: nothing may be lost.

`make chaos`, or `python -m chaos --kills 50 --writes 8 --servers 1`. In a copy of this repository with
tiny parameters the trainings run undisturbed: that is the reference. Then, each in a fresh copy of it,
DVC is made to forget a training, a fault happens to its `dvc repro`, and a plain `dvc repro` follows.
What `chaos.checks` then finds is a violation.

Everything is drawn from `--seed` and the case's number: `--only "kill 17"` plays one case again.
Exit status: 0, or 1 for a violation.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from chaos import cases
from chaos.cases import Case, Outcome, draw_kill, draw_server, draw_write
from chaos.sandbox import NEEDS, Sandbox, make_sandbox
from tools.command import Parser


def run_case(case: Case, sandbox: Sandbox) -> Outcome:
    """Run a case, and keep its folder if there is a violation."""
    try:
        outcome = cases.run(case, sandbox)
    except Exception as error:  # a command hangs, say: the other cases run on
        outcome = Outcome(name=case.name, stage=case.training.name, violations=[f"{error!r}; {case}"])
    if not outcome.violations:
        shutil.rmtree(sandbox.folder / case.name.replace(" ", "-"), ignore_errors=True)
    return outcome


def run_all(drawn: Sequence[Case], sandbox: Sandbox, workers: int) -> list[Outcome]:
    """Run the cases side by side, and print a line on each."""
    outcomes = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(run_case, case, sandbox) for case in drawn]):
                outcomes.append(done.result())
                print(line_of(outcomes[-1]), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # the cases that run come to their end
            raise
    return outcomes


def line_of(outcome: Outcome) -> str:
    notes = ", resumed" * outcome.resumed + ", after tools.repair_dvc" * bool(outcome.repaired)
    lines = [f"{outcome.name}, {outcome.stage}: {outcome.description}{notes}"]
    return "\n".join([*lines, *(f"    VIOLATION: {violation}" for violation in outcome.violations)])


def summary(outcomes: Sequence[Outcome], sandbox: Sandbox, seed: int) -> int:
    """Print what the kills hit, and how to play violations again; return the exit status."""
    kills = [outcome for outcome in outcomes if outcome.name.startswith("kill")]
    hit = {outcome.stage for outcome in kills}
    missed = sorted({training.name for training in sandbox.trainings} - hit)
    stages = f"{len(hit)}, not {', '.join(missed)}" if missed else "all"
    violated = [outcome for outcome in outcomes if outcome.violations]
    print(f"kills: {len(kills)}, stages hit: {stages}, violations: {len(violated)} (seed {seed})")
    for outcome in violated:
        print(f'again: python -m chaos --seed {seed} --only "{outcome.name}"; see {sandbox.folder}')
    return int(bool(violated))


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=50)
    add("--writes", type=int, default=8, help="writes that fail")
    add("--servers", type=int, default=1, help="MLflow servers that die")
    add("--stages", nargs="+", choices=NEEDS, default=list(NEEDS), help="with those they need")
    add("--workers", type=int, default=3, help="cases side by side")
    add("--seed", type=int, default=random.randrange(10**6))
    add("--keep", type=Path, help="a new folder to work in, which stays")
    add("--only", help='play one case again: "kill 17"')
    return parser.parse_args()


def main() -> int:
    options = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
    if options.keep:
        options.keep.mkdir(parents=True)
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    print(f"seed {options.seed}, in {folder}", flush=True)
    sandbox = make_sandbox(folder, options.stages)
    numbers = {draw_server: options.servers, draw_write: options.writes, draw_kill: options.kills}
    drawn = [
        draw(number, options.seed, sandbox)
        for draw, count in numbers.items()
        for number in range(1, count + 1)
    ]
    chosen = [case for case in drawn if options.only in (None, case.name)]
    status = summary(run_all(chosen, sandbox, options.workers), sandbox, options.seed)
    if not status and not options.keep:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
