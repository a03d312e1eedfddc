"""Run experiments as jobs of a SLURM cluster: `python -m tools.submit gamma=5 "gamma=10 seed=1"`.

Each job clones the Git remote, runs one experiment by `dvc exp run`, and sends its result by
`dvc exp push` to the Git remote and the DVC remote. `dvc exp pull origin NAME` and `make sync` bring it
here. docs/distributed.md explains it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import yaml

from pipeline import config
from pipeline.infra.errors import UserError
from pipeline.infra.git import git
from pipeline.infra.resume import project_root
from tools.command import Parser, command

JOB = Path(__file__).with_name("submit_job.sh")
FOLDER = Path(".jobs")  # in the project, which the machines of a cluster usually share
REMOTE = "origin"
PULL = f"dvc exp pull {REMOTE}"


def name_of(settings: str) -> str:
    """An experiment's name, of its settings: `gamma=5 seed=1` is gamma-5-seed-1."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", settings.replace("=-", "=minus")).strip("-.")


def by_name(experiments: list[str]) -> dict[str, list[str]]:
    """The settings of each experiment, by its name.

    Raises:
        UserError: an argument holds no settings, or two of them give the same name.
    """
    texts: dict[str, str] = {}
    for text in experiments:
        name = name_of(text)
        if name in texts:
            raise UserError(f"{texts[name]!r} and {text!r} are both named {name}; name it once")
        texts[name] = text
    return {name: settings_of(text) for name, text in texts.items()}


def settings_of(text: str) -> list[str]:
    """The settings of an argument, `PARAMETER=VALUE` each.

    Raises:
        UserError: there is none, or one has no `=`.
    """
    try:
        settings = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r}: {error}; write it as 'gamma=5 seed=1'") from None
    for setting in settings or [""]:
        if not re.fullmatch(r"[\w.]+=.+", setting):
            raise UserError(f"{setting!r} is no PARAMETER=VALUE; write it as 'gamma=5 seed=1'")
    return settings


def require_valid(settings: list[str], params: Path) -> None:
    """Check params.yaml with these settings, as the first stage would do in the job.

    Raises:
        ParamsError: it names the key, the value and what the key takes.
    """
    values = config.read(params)
    for setting in settings:
        key, _, value = setting.partition("=")
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.load(value, config.Loader)
    config.check(values, f"params.yaml with {' '.join(settings)}")


def require_shared(root: Path) -> tuple[str, str]:
    """The URL of the Git remote and the commit that a job runs, which the remote has.

    Raises:
        UserError: a job could not get the code, or not send its results.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch: this machine submits to no SLURM cluster; on one machine "
            "`dvc exp run --queue` and `dvc queue start` run experiments"
        )
    url = git("remote", "get-url", REMOTE, folder=root)
    if not url:
        raise UserError(f"there is no Git remote {REMOTE}; `git remote add {REMOTE} URL` names one")
    if changed := git("status", "--porcelain", "--untracked-files=no", folder=root):
        first = changed.splitlines()[0].split()[-1]
        raise UserError(
            f"{first} differs from the commit, which is what a job runs; commit it, or undo it"
        )
    commit = git("rev-parse", "HEAD", folder=root)
    if not git("branch", "--remotes", "--contains", commit, "--list", f"{REMOTE}/*", folder=root):
        raise UserError(f"commit {commit[:7]} is not on {REMOTE}, where jobs take it from; `git push`")
    remote = ["dvc", "config", "--project", "core.remote"]
    if subprocess.run(remote, cwd=root, capture_output=True).returncode:
        raise UserError(
            "no DVC remote is committed as the default, to which jobs could send checkpoints; "
            "`dvc remote add -d store URL`, commit .dvc/config, and `git push`"
        )
    return url, commit


def require_new(names: list[str], root: Path) -> None:
    """Refuse an experiment's name that is taken, on the remote or among the jobs.

    Raises:
        UserError: it names the first such name.
    """
    listed = git("ls-remote", REMOTE, "refs/exps/*", folder=root).splitlines()
    taken = {line.rpartition("/")[2] for line in listed}
    for name in names:
        if name in taken:
            raise UserError(f"{REMOTE} has an experiment {name} already; `{PULL} {name}` brings it")
        if (root / FOLDER / name).exists():
            raise UserError(
                f"{FOLDER / name} is of a job that has not ended; `squeue` shows it; if it is gone, "
                f"`rm -r {FOLDER / name}` (which drops what it saved), and repeat"
            )


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "experiments",
        nargs="+",
        metavar="SETTINGS",
        help="of one experiment: gamma=5, or 'gamma=5 seed=1'",
    )
    parser.add_argument(
        "--sbatch", default="", help="options for sbatch in one word: '--gres=gpu:1 --time=4:00:00'"
    )


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    root = project_root().resolve()
    settings = by_name(arguments.experiments)
    for words in settings.values():
        require_valid(words, root / "params.yaml")
    url, commit = require_shared(root)
    require_new(list(settings), root)
    (root / FOLDER).mkdir(exist_ok=True)
    # DVC would take the submitting checkout for the project
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    for name, words in settings.items():
        folder = root / FOLDER / name
        log = folder.with_suffix(folder.suffix + ".log")
        options = ["--parsable", "--requeue", "--open-mode=append", f"--job-name={name}"]
        job = [str(JOB), str(root), str(folder), url, commit, name, *words]
        done = subprocess.run(
            ["sbatch", *options, f"--output={log}", *shlex.split(arguments.sbatch), *job],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        number = done.stdout.strip().partition(";")[0]
        print(f"{name}: job {number}, {log.relative_to(root)}", flush=True)
    print(
        f"`squeue --me` shows them; when they have ended: `{PULL} {' '.join(settings)}` and `make sync`"
    )


if __name__ == "__main__":
    main()
