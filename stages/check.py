"""check: params.yaml as a whole, before any other stage runs.

DVC gives a stage only the parameters that it lists, so a mistyped key would change nothing and nobody
would notice. This stage depends on all of params.yaml. Its out never changes, so no other stage reruns.
"""

from pathlib import Path

from pipeline.config import load
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError, explain
from pipeline.tracking.connection import mode
from stages.support.inputs import require_unchanged

OUT = Path("data/params.ok")


def main() -> None:
    """Refuse a params.yaml that can't be used."""
    mode()  # refuses a BLOCKDROP_TRACKING that it does not know
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
