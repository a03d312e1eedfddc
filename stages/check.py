"""check: params.yaml as a whole, before any other stage runs.

DVC compares only the parameters that a stage names, so a mistyped key would rerun nothing and go
unnoticed. This stage depends on the whole file. Its out never changes, so it makes no other stage rerun.
"""

from pathlib import Path

from pipeline.config import load
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError, explain
from pipeline.tracking.connection import mode
from stages.support.inputs import require_unchanged

OUT = Path("data/params.ok")


def main() -> None:
    mode()  # refuses an unknown BLOCKDROP_TRACKING
    load()
    write_text(OUT, "params.yaml was read and can be used\n")
    require_unchanged()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: {explain(error) or error}") from None
