"""What every stage shares: the folders, the frame around each script, small files."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.config import load as load_params
from pipeline.device import choose_device, describe_device
from pipeline.infra import processes, ranks
from pipeline.infra.atomic_io import failures_name, write_text, write_through
from pipeline.infra.errors import UserError, explain, explain_memory
from pipeline.infra.ranks import RankInfo, is_main, rank_info
from pipeline.infra.safe_io import short_repr
from pipeline.infra.signals import exit_on_sigterm, exit_with_parent
from pipeline.tracking.connection import OFF, mode
from pipeline.tracking.connection import VARIABLE as TRACKING
from stages import PARENT
from stages.support.inputs import require_unchanged

PREPARED = Path("data/prepared")
MODELS = Path("models")
PRETRAINED = Path("models/pretrain")
PRUNED = Path("models/prune")  # pretrain's, where nothing is pruned
POLICY_PRETRAINED = Path("models/policy_pretrain")
POLICY = Path("models/curriculum")
FINETUNED = Path("models/finetune")
SOLE = Path("models/sole")
STATIC = Path("models/static")
METRICS = Path("metrics")
PLOTS = Path("plots")


def run(main: Callable[[Params], None], *, trains: bool = False) -> None:
    """Check params.yaml, then run a stage; what the user can mend ends in one line, not a traceback.

    Exit status 1 for such an error, 130 after Ctrl-C, 143 after SIGTERM or when DVC has died: never 0,
    so that DVC takes no partial result for a whole one.

    Args:
        trains: it is a training, which several processes may share (BLOCKDROP_PROCESSES, torchrun).
    """
    exit_on_sigterm()
    if "DVC_ROOT" in os.environ or "RANK" in os.environ:  # DVC is the parent, or torchrun
        exit_with_parent(PARENT)
    try:
        _run(main, trains=trains)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        if is_main():
            print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        _fail_or_raise(explain(error), error)
    except (MemoryError, RuntimeError) as error:
        _fail_or_raise(explain_memory(error) or processes.explain_peer_failure(error), error)


def _run(main: Callable[[Params], None], *, trains: bool) -> None:
    count, world_size = processes.requested_world_size(choose_device()), rank_info().size
    mode()  # refuses a BLOCKDROP_TRACKING that it does not know
    params = load_params()
    if world_size > 1 and not trains:
        raise UserError("only trainings take several processes; start this stage without torchrun")
    if trains and count > 1 and world_size == 1:
        from pipeline.infra import torchrun  # one process alone does without it

        sys.exit(torchrun.launch(count))
    if not is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the end
        os.environ[TRACKING] = OFF
    try:
        with processes.process_group(choose_device()) if trains else nullcontext():
            require_unchanged()  # while params.yaml and code were read
            main(params)
            if is_main():
                require_unchanged()
    except BaseException:
        ranks.wait_for_rank0_exit()
        raise


def _fail_or_raise(message: str | None, error: Exception) -> None:
    if message is None:  # a defect of this project: with its traceback
        raise error
    _fail(message)


def _fail(message: str) -> None:
    try:
        info = rank_info()
    except UserError:  # which may be the error that the message tells
        info = RankInfo()
    process = "" if info.rank == 0 else f" in process {info.rank + 1} of {info.size}"
    print(f"error{process}: {message}", file=sys.stderr)
    if info.size > 1:  # torchrun ends this process too: not by an exception inside an exit handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(1)


def require_writable(*folders: Path) -> None:
    """See that files can be written there, before hours of training and not after.

    Raises:
        OSError: they can't.
    """
    for folder in folders:
        with failures_name(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe.tmp"
            write_through(probe, b"")
            probe.unlink(missing_ok=True)  # another process may probe as well


def require_seen(folder: Path, files: Collection[Path]) -> None:
    """See that DVC notices changes to these files, which lie in a folder that a stage depends on.

    DVC leaves out what `.dvcignore` hides and what lies behind a link to another folder.

    Raises:
        UserError: a file is left out; the message names the pattern or the link.
    """
    folders = {parent for path in files for parent in path.parents if folder in parent.parents}
    link = min((path for path in folders if path.is_symlink()), default=None)
    if link is not None:
        raise UserError(
            f"{link} is a link to a folder, which DVC does not follow, so it would not notice changes "
            f"behind it; put the folder itself there (only {folder} as a whole may be a link)"
        )
    names = [os.path.abspath(path) for path in (folder, *files)]  # noqa: PTH100 - links stay links
    command = [sys.executable, "-m", "dvc", "check-ignore", "--details", "--stdin"]
    ignored = subprocess.run(  # without a DVC project nothing is hidden, and nothing recorded
        command, input="".join(f"{name}\n" for name in names if "\n" not in name), check=False,
        capture_output=True, encoding="utf-8", errors="surrogateescape",
    ).stdout  # fmt: skip
    if ignored:
        pattern, name = ignored.partition("\n")[0].split("\t")
        raise UserError(
            f"{short_repr(name)} is hidden from DVC ({short_repr(pattern)}), which would not notice "
            "changes there; put the files into another folder, or change that pattern"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted JSON, so that equal results are equal bytes."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def csv_text(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None) -> str:
    """A table; every row has `columns`, by default the keys of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None
) -> None:
    write_text(path, csv_text(rows, columns=columns))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows that `write_csv` wrote; their values are strings."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_times(stage: str, seconds: float, images: int, *, fewest_threads: int) -> None:
    """How long a training took, in a file of its own: it differs from run to run, results do not."""
    content = {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "device": ranks.describe(describe_device(choose_device())),
        "fewest_threads": fewest_threads,
    }
    write_json(METRICS / "times" / f"{stage}.json", content)
