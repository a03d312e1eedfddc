"""Put a ready parameter file in place: `make preset NAME=cifar10_resnet32`."""

import argparse
import shutil
from pathlib import Path

from pipeline.errors import UserError
from pipeline.params import load

PRESETS = Path("presets")
PARAMS = Path("params.yaml")


def use(name: str) -> None:
    """Copy a preset to params.yaml.

    Raises:
        SystemExit: there is no such preset, or params.yaml holds changes that are in no preset.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in known:
        raise SystemExit(f"error: NAME={name}: there is no such preset; choose {', '.join(known)}")
    presets = {path.read_bytes() for path in PRESETS.glob("*.yaml")}
    if PARAMS.exists() and PARAMS.read_bytes() not in presets:
        raise SystemExit(
            f"error: {PARAMS} was changed and would be lost; keep it (`cp params.yaml "
            "presets/mine.yaml`) or give it up (`rm params.yaml`), then repeat"
        )
    try:
        load(PRESETS / f"{name}.yaml")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    shutil.copyfile(PRESETS / f"{name}.yaml", PARAMS)
    print(f"{PARAMS} is now {name}; run `dvc repro`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    use(parser.parse_args().name)
