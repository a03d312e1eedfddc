"""Search parameters with Optuna, or repeat one setting with several seeds: `make study`.

Each trial is a DVC experiment `study-NAME-NUMBER`, run in a temporary folder. Validation images judge
it, never test images: accuracy up and FLOPs down, or with --budget accuracy at no more FLOPs than that.
The trials lie in results/own/studies.db; run it again, and it goes on. docs/study.md explains it.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import config
from pipeline.data.dataset import load_split
from pipeline.data.split import ImageSplit
from pipeline.device import choose_device
from pipeline.flops import measure
from pipeline.inference.predict import predict, predict_policy
from pipeline.infra.errors import UserError
from pipeline.infra.git import git
from pipeline.infra.locks import exclusive
from pipeline.infra.resume import key_of, project_root
from pipeline.infra.signals import exit_on_sigterm
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.policies import greedy_actions
from pipeline.report.tables import markdown_table
from tools.command import Parser, command
from tools.submit import require_valid, settings_of

FOLDER = Path("results/own")  # which Git ignores
PARAMS = Path("params.yaml")
SPACE = """gamma=0.5..20:log
curriculum.entropy_coef=0.01..0.5:log finetune_policy.entropy_coef=0.01..0.2:log
curriculum.lr=0.0005..0.005:log finetune.lr=0.0002..0.005:log finetune_policy.lr=0.0002..0.005:log"""
RANGE = re.compile(r"([^:]+?)\.\.([^:]+)(:log)?")
EPOCH = re.compile(  # a line of stages.support.progress
    r"(?P<stage>curriculum|finetune) epoch (?P<epoch>\d+)/(?P<epochs>\d+): "
    r"accuracy (?P<accuracy>[\d.e+-]+),.* blocks (?P<blocks>[\d.e+-]+),"
    r".* active_blocks (?P<all>[\d.e+-]+)"
)
KEPT = 75.0  # percent of the trials that go on after an epoch; the others are pruned
STARTUP_TRIALS = 5  # that are complete before one is pruned
STOP_SECONDS = 120  # for a training to end its step and to save, before it is asked again
MEASURES = ("validation_accuracy", "validation_flops", "test_accuracy", "test_flops")
OnEpoch = Callable[[re.Match[str]], None]


class TrialError(UserError):
    """An experiment failed; the message is the error that it ended with."""


def space_of(settings: Sequence[str], params: Path) -> tuple[list[str], dict[str, Any]]:
    """The settings that all trials have, and Optuna's distributions of those that are searched.

    Raises:
        UserError: a parameter, value or range can't be used.
    """
    from optuna import distributions

    present = config.load(params).flat()
    fixed: list[str] = []
    searched: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        limits = RANGE.fullmatch(text)
        texts = limits.groups()[:2] if limits else text.split(",")
        if len(texts) == 1 or text.startswith("["):
            require_valid([setting], params)
            fixed.append(setting)
            continue
        for end in texts:
            require_valid([f"{key}={end}"], params)
        values = [yaml.load(end, config.Loader) for end in texts]
        if limits is None:
            searched[key] = distributions.CategoricalDistribution(values)
            continue
        whole = all(re.fullmatch(r"-?\d+", number) for number in (*texts, str(present[key])))
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        try:
            low, high = values
            searched[key] = kind(low, high, log=limits[3] is not None)
        except (TypeError, ValueError) as error:
            raise UserError(f"{setting}: {error}; write a range as gamma=1..20:log") from None
    require_valid(fixed, params)
    return fixed, searched


def open_study(
    name: str, *, fixed: Sequence[str], searched: Mapping[str, Any], budget: float | None
) -> Any:
    """Optuna's study of that name, begun or taken up.

    Raises:
        UserError: it was begun with other settings, so that its trials can't be compared.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{project_root().resolve() / FOLDER / 'studies.db'}",
        directions=["maximize", "minimize"] if budget is None else ["maximize"],
        pruner=optuna.pruners.PercentilePruner(KEPT, n_startup_trials=STARTUP_TRIALS),
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # other numbers when taken up
    present = config.load(project_root() / PARAMS).flat()
    about = {
        "--set": [*sorted(fixed), *(f"{key}={kind}" for key, kind in sorted(searched.items()))],
        "--budget": budget,
        "params.yaml": key_of(**{key: text for key, text in present.items() if key not in searched}),
    }
    begun = study.user_attrs.get("about", about)
    if differing := [key for key in about if begun[key] != about[key]]:
        raise UserError(
            f"the study {name} was begun with another {' and '.join(differing)}, so new trials can't be "
            "compared with its own; give the same again, or `make study STUDY=other` begins another one"
        )
    study.set_user_attr("about", about)
    return study


def plan(study: Any, *, trials: int, seeds: int | None) -> list[dict[str, Any]]:
    """What is to be run: parameters of each trial, empty where the sampler chooses them.

    Trials that Ctrl-C or a kill has interrupted come first: their trainings go on from the last save.
    """
    from optuna.trial import TrialState

    done, interrupted = [], []
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:  # of a process that was killed
            study.tell(trial.number, state=TrialState.FAIL)
        ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if ended or (not seeds and "error" in trial.user_attrs):
            done.append(trial.params)
        elif trial.params not in interrupted:
            interrupted.append(trial.params)
    if seeds:
        return [{"seed": seed} for seed in range(seeds) if {"seed": seed} not in done]
    again = [params for params in interrupted if params not in done]
    count = max(0, trials - len(done))
    return [*again, *({} for _ in range(count))][:count]


def run_experiment(name: str, settings: Sequence[str], log: Path, on_epoch: OnEpoch) -> None:
    """Run a DVC experiment in a temporary folder; its output goes to the file `log`.

    When `on_epoch` raises, the experiment ends as by Ctrl-C: DVC removes the folder and keeps nothing.

    Raises:
        TrialError: it failed.
    """
    words = [word for setting in settings for word in ("-S", setting)]
    log.parent.mkdir(parents=True, exist_ok=True)
    error = "there was no output"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            ["dvc", "exp", "run", "--temp", "--name", name, *words],
            cwd=project_root(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
            process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on
        ) as process,
    ):  # fmt: skip
        try:
            for line in process.stdout or ():
                print(line, end="", file=file, flush=True)
                if line.startswith("error: ") or not error.startswith("error: "):
                    error = line.strip() or error
                if epoch := EPOCH.match(line):
                    on_epoch(epoch)
        except BaseException:
            while process.poll() is None:  # each further Ctrl-C is passed on too
                with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    os.killpg(process.pid, signal.SIGINT)
                    process.communicate(timeout=STOP_SECONDS)
            raise
    if process.returncode:
        raise TrialError(f"{error.removeprefix('error: ')} ({log})")


def worth_of(pair: Checkpoint, split: ImageSplit, device: torch.device) -> tuple[float, float]:
    """Accuracy of a finetuned pair on a split, and its FLOPs as a fraction of the full ResNet's."""
    resnet, policy_net = pair.need_resnet().to(device), pair.need_policy_net().to(device)
    predictions = predict(resnet, split, normalisation=pair.normalisation, policy_net=policy_net)
    logits = predict_policy(policy_net, split, normalisation=pair.normalisation)
    cost = measure(resnet, policy_net, split.image_size)
    flops = float(cost.of(greedy_actions(torch.sigmoid(logits))).mean())
    return predictions.accuracy, flops / cost.full


def measure_experiment(name: str, baseline: str) -> dict[str, float]:
    """An experiment's accuracies and FLOPs (of the full ResNet's), as fractions, by MEASURES.

    No stage writes the FLOPs of validation images, so they are computed here.

    Raises:
        UserError: a file of the experiment is damaged.
    """
    from dvc.api import DVCFileSystem  # slow to import

    root, device = project_root(), choose_device()
    revision = git("rev-parse", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", folder=root)
    files = DVCFileSystem(str(root), rev=revision)
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        for path in (*files.find("models/finetune"), *files.find("data/prepared")):
            if not Path(path).name.startswith(("train_", "test_")):
                (target := Path(folder, path.lstrip("/"))).parent.mkdir(parents=True, exist_ok=True)
                files.get_file(path, str(target))
        split = load_split(Path(folder, "data/prepared"), "validation", device)
        values = worth_of(checkpoint.load(Path(folder, "models/finetune")), split, device)
    test = json.loads(files.read_text("metrics/evaluate.json"))
    test_values = (test["accuracy"], test["flops_mean"] / test["full_flops"])
    return dict(zip(MEASURES, (*values, *test_values), strict=True))


def run_trial(study: Any, trial: Any, fixed: Sequence[str], budget: float | None) -> str:
    """Run a trial's experiment and keep its measures; one line on them.

    Raises:
        TrialPruned: it was among the worst, after the curriculum or an epoch of finetuning.
        UserError: it failed.
    """
    import optuna

    def on_epoch(line: re.Match[str]) -> None:
        last = line["epoch"] == line["epochs"]
        # Optuna prunes by one value; in the curriculum few blocks are decided before its end
        if budget is None or (line["stage"] == "curriculum" and not last):
            return
        excess = max(0.0, float(line["blocks"]) / float(line["all"]) - budget)
        step = 0 if line["stage"] == "curriculum" else int(line["epoch"])
        trial.report(float(line["accuracy"]) - excess, step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"after epoch {line['epoch']} of {line['stage']}")

    root, name = project_root(), f"study-{study.study_name}-{trial.number}"
    baseline = git("rev-parse", "HEAD", folder=root)
    settings = [*fixed, *(f"{key}={value}" for key, value in trial.params.items())]
    print(f"{name}: {' '.join(settings)}", flush=True)
    run_experiment(name, settings, root / FOLDER / "studies" / f"{name}.log", on_epoch)
    for key, value in (measures := measure_experiment(name, baseline)).items():
        trial.set_user_attr(key, value)
    accuracy, flops, *_ = measures.values()
    if budget is not None:
        trial.set_constraint("flops", flops - budget)
    study.tell(trial, [accuracy, flops][: len(study.directions)])
    return f"{100 * accuracy:.2f} % of the validation images correct, {100 * flops:.1f} % of the FLOPs"


def run_all(
    study: Any,
    planned: Sequence[Mapping[str, Any]],
    *,
    fixed: Sequence[str],
    searched: Mapping[str, Any],
    budget: float | None,
) -> None:
    """Run the trials; one that fails does not stop the others."""
    import optuna
    from optuna.trial import TrialState

    for params in planned:
        if params:
            study.enqueue_trial(params)
        trial = study.ask(searched)
        try:
            outcome = run_trial(study, trial, fixed, budget)
        except optuna.TrialPruned as error:
            study.tell(trial, state=TrialState.PRUNED)
            outcome = f"pruned {error}"
        except UserError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
            outcome = f"failed: {error}"
        except BaseException:  # Ctrl-C: without an error, it is run again (`plan`)
            study.tell(trial, state=TrialState.FAIL)
            raise
        print(f"  {outcome}", flush=True)


def table_of_best(study: Any) -> str:
    """The best trials, as Markdown: by validation images alone."""
    best = sorted(study.best_trials, key=lambda trial: trial.user_attrs["validation_flops"])
    if not best:
        return "no trial is complete and within the budget yet"
    rows = [
        (
            f"study-{study.study_name}-{trial.number}",
            *(f"{100 * trial.user_attrs[key]:.2f} %" for key in MEASURES[:2]),
            " ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in trial.params.items()
            ),
        )
        for trial in best
    ]
    return markdown_table(("best trials", *MEASURES[:2], "parameters"), rows)


def table_of_seeds(study: Any) -> str:
    """Mean and spread of each measure over the seeds that are complete, as Markdown."""
    runs = [trial.user_attrs for trial in study.trials if trial.values is not None]
    rows = []
    for key in MEASURES if runs else ():
        values = [100 * run[key] for run in runs]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        ends = f"{min(values):.2f} to {max(values):.2f} %"
        rows.append((key, f"{statistics.mean(values):.2f}{spread} %", ends))
    return markdown_table((f"{len(runs)} seeds", "mean +- standard deviation", "range"), rows)


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="gamma=1..20 (a range), gamma=1..20:log (even by its logarithm),\n"
        "finetune.optimizer=sgd,adam (a choice), finetune.epochs=20 (in all trials);\n"
        "in one word there are blanks between several.\n"
        f"Without a range or choice, these are searched:\n{SPACE}",
    )
    parser.add_argument("--trials", type=int, default=20, help="in all, with those that are done (20)")
    parser.add_argument(
        "--budget",
        type=float,
        help="0.5: the best accuracy at half of the full ResNet's FLOPs; hopeless trials are pruned",
    )
    parser.add_argument("--seeds", type=int, help="5: no search, but one setting with seeds 0 to 4")
    parser.add_argument("--study", default="", help="its name (search; of seeds: seeds)")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    """Begin the study or take it up, and run what is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("Optuna is not installed here; `make study` installs it") from None
    seeds, root = arguments.seeds, project_root()
    name = arguments.study or ("seeds" if seeds else "search")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name):
        raise UserError(f"--study {name}: take letters, digits and - for a study's name")
    fixed, searched = space_of(
        [setting for text in arguments.set for setting in settings_of(text)], root / PARAMS
    )
    if seeds and (searched or any(setting.startswith("seed=") for setting in fixed)):
        raise UserError("with --seeds, --set takes one value for a parameter other than seed")
    if not searched:
        usual = [f"seed=0..{2**31 - 1}"] if seeds else settings_of(SPACE)
        given = {setting.partition("=")[0] for setting in fixed}
        usual = [setting for setting in usual if setting.partition("=")[0] not in given]
        _, searched = space_of(usual, root / PARAMS)
    budget = None if seeds else arguments.budget
    exit_on_sigterm()
    # where Ctrl-C is ignored (a script's background), experiments would ignore that they are pruned
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with exclusive(
        root / FOLDER / "studies.lock", waiting_message="study: waiting for another one to end"
    ):
        study = open_study(name, fixed=fixed, searched=searched, budget=budget)
        planned = plan(study, trials=arguments.trials, seeds=seeds)
        if not planned:
            print("every trial is done; --trials or --seeds with a larger number runs more")
        run_all(study, planned, fixed=fixed, searched=searched, budget=budget)
    print(table_of_seeds(study) if seeds else table_of_best(study))


if __name__ == "__main__":
    main()
