"""Put a ready parameter file in place: `make preset NAME=cifar10_resnet32`."""

import argparse
from pathlib import Path

from pipeline.config import load
from pipeline.infra.atomic_io import write_atomically
from pipeline.infra.errors import UserError
from tools.command import Parser, command

PRESETS = Path("presets")
PARAMS = Path("params.yaml")


def use(name: str) -> None:
    """Copy a preset to params.yaml.

    Raises:
        SystemExit: there is no such preset, params.yaml holds changes that are in no preset, or a file
            can't be read or written.
    """
    try:
        _use(name)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(
            f"error: {error.filename}: {error.strerror}; mend that and repeat, nothing was changed"
        ) from None
    print(f"{PARAMS} is now {name}; run `make repro`")


def _use(name: str) -> None:
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in known:
        raise UserError(f"NAME={name}: there is no such preset; choose {', '.join(known)}")
    presets = {path.read_bytes() for path in PRESETS.glob("*.yaml")}
    if PARAMS.exists() and PARAMS.read_bytes() not in presets:
        raise UserError(
            f"{PARAMS} was changed and would be lost; keep it (`cp params.yaml "
            "presets/mine.yaml`) or give it up (`rm params.yaml`), then repeat"
        )
    load(PRESETS / f"{name}.yaml")
    write_atomically(PARAMS, (PRESETS / f"{name}.yaml").read_bytes())


def add_options(parser: Parser) -> None:
    parser.add_argument("name")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    use(arguments.name)


if __name__ == "__main__":
    main()
