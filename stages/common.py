"""What every stage shares: where things lie, the frame around each script, small files."""

import csv
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.params import load as load_params
from pipeline.runtime import choose_device, describe_device

PREPARED = Path("data/prepared")
PRETRAINED = Path("models/pretrain")
POLICY = Path("models/curriculum")
FINETUNED = Path("models/finetune")
SOLE = Path("models/sole")
STATIC = Path("models/static")
METRICS = Path("metrics")
PLOTS = Path("plots")


def run(main: Callable[[Params], None]) -> None:
    """Check params.yaml, then run a stage; what the user can mend ends in one line, not a traceback.

    Exit status 1 for such an error, 130 after Ctrl-C, 143 after SIGTERM: never 0, so that DVC takes no
    partial result for a whole one.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(load_params())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last whole epoch", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _terminate(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted JSON, so that equal results are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None
) -> None:
    """A table; every row has `columns`, by default the keys of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote, as texts."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_times(stage: str, seconds: float, images: int) -> None:
    """How long a stage took, in a file of its own: it differs from run to run, results do not."""
    content = {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "device": describe_device(choose_device()),
    }
    write_json(METRICS / "times" / f"{stage}.json", content)
