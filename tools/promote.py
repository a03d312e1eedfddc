"""Make the model of an experiment the champion: `python -m tools.promote gamma-5`.

Registers the model that was logged at a run and gives it an alias, so that it can be named without
knowing its version: `models:/blockdrop@champion`.
"""

import sys

from pipeline.errors import UserError
from pipeline.tracking.models import ALIAS, NAME, Promotion, promote
from pipeline.tracking.store import shown_uri
from tools.command import Parser


def describe(made: Promotion) -> str:
    """What changed, and how to use it."""
    if made.previous is None:
        before = "there was none"
    elif made.previous == made.version:
        before = "the same"
    else:
        before = f"version {made.previous} (models:/{made.name}/{made.previous})"
    return (
        f"{made.alias} of {made.name}: version {made.version} (run {made.run_name}, {made.model_id})\n"
        f"before: {before}\n"
        f"python -m tools.predict IMAGE --model {made.uri}"
    )


def main() -> None:
    """Promote, then say which version was the champion and which is."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="NAME_OR_RUN", help="an experiment's name, or the id of a run")
    parser.add_argument("--registered-name", default=NAME, help=f"of the registered model ({NAME})")
    parser.add_argument("--alias", default=ALIAS, help=f"({ALIAS})")
    arguments = parser.parse_args()
    try:
        made = promote(arguments.run, registered_name=arguments.registered_name, alias=arguments.alias)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # whatever the store's library raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"error: {shown_uri()} can't be used ({first}); start it, or set MLFLOW_TRACKING_URI")
    print(describe(made))


if __name__ == "__main__":
    main()
