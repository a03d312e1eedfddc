"""Mend what a killed DVC leaves torn, before `make repro` runs it.

DVC 3.67 writes dvc.lock and its list of locks in place; killed in the middle of that it refuses to read
them ever after. DVC finds again all that is in them: its run cache has the results of the stages.
"""

import json
from pathlib import Path

import yaml

from tools.command import Parser

LOCK = Path("dvc.lock")
READ_BY_DVC = (LOCK, Path("dvc.yaml"), Path("params.yaml"))
LIST_OF_LOCKS = Path(".dvc/tmp/rwlock")
CONFLICT = "<<<<<<<"


def torn(folder: Path) -> list[Path]:
    """Which of the two files of a checkout can't be read."""
    found = []
    try:
        text = (folder / LOCK).read_text(encoding="utf-8") if (folder / LOCK).exists() else CONFLICT
        if CONFLICT not in text:  # a merge that is under way is its user's
            stages = yaml.safe_load(text)["stages"]
            [(entry["cmd"], entry["outs"][0]["path"]) for entry in stages.values()]
    except (ValueError, yaml.YAMLError, TypeError, KeyError, IndexError, AttributeError):
        found.append(LOCK)
    try:
        if (folder / LIST_OF_LOCKS).exists():
            json.loads((folder / LIST_OF_LOCKS).read_text(encoding="utf-8"))
    except ValueError:
        found.append(LIST_OF_LOCKS)
    return found


def require_plain(folder: Path) -> None:
    """DVC would wait for a pipe for ever, and read a device without end."""
    for name in READ_BY_DVC:
        if (folder / name).exists() and not (folder / name).is_file():
            raise SystemExit(f"error: {name} is no plain file (nor a link to one); put the file there")


def mend(folder: Path) -> list[Path]:
    """Put them aside, where somebody who wonders finds them; their names."""
    names = torn(folder)
    for name in names:
        (folder / name).replace(folder / f"{name}.torn")
    return names


def main() -> None:
    """Mend the checkout that is the working folder."""
    require_plain(Path())
    for name in mend(Path()):
        print(f"{name} was torn by a DVC that was killed; it is now {name}.torn, and DVC makes it anew")


if __name__ == "__main__":
    Parser(description=__doc__).parse_args()
    main()
