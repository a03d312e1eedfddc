"""Make the model of an experiment the champion: `python -m tools.promote gamma-5`.

Registers the model that was logged at a run and gives it an alias, so that it has a name without a
version: `models:/blockdrop@champion`.
"""

import argparse
import sys

from pipeline.infra.errors import UserError
from pipeline.infra.resume import project_root
from pipeline.infra.safe_io import printable
from pipeline.tracking.connection import reason
from pipeline.tracking.registry import ALIAS, NAME, Promotion, UnknownRunError, promote
from pipeline.tracking.store import shown_uri
from tools.command import Parser, command


def describe(promotion: Promotion) -> str:
    """The champion's version, the one before, and the command that uses it."""
    name, version, previous = promotion.name, promotion.version, promotion.previous
    if previous is None:
        before = "there was none"
    elif previous == version:
        before = "the same"
    else:
        before = f"version {previous} (models:/{name}/{previous})"
    run = printable(promotion.run_name)
    return (
        f"{promotion.alias} of {name}: version {version} (run {run}, {promotion.model_id})\n"
        f"before: {before}\n"
        f"python -m tools.predict IMAGE --model {promotion.uri}"
    )


def promote_newest(run: str, **names: str) -> Promotion:
    """`promote`, after a sync where DVC knows the experiment and MLflow does not, or by an old name.

    Raises:
        ModelError: as `promote`.
    """
    try:
        return promote(run, **names)
    except UnknownRunError:
        from tools.sync import references, sync  # slow to import, and seldom needed

        try:
            known = {reference.name for reference in references(project_root())}
        except UserError:
            known = set()
        if run not in known:
            raise
        sync(project_root())
        return promote(run, **names)


def add_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="NAME_OR_RUN", help="an experiment's name, or the id of a run")
    parser.add_argument("--registered-name", default=NAME, help=f"of the registered model ({NAME})")
    parser.add_argument("--alias", default=ALIAS, help=f"({ALIAS})")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    try:
        promotion = promote_newest(
            arguments.run, registered_name=arguments.registered_name, alias=arguments.alias
        )
    except UserError:
        raise
    except Exception as error:  # whatever the store's library raises
        sys.exit(
            f"error: {shown_uri()} can't be used ({reason(error)}); start it, or set MLFLOW_TRACKING_URI"
        )
    print(describe(promotion))


if __name__ == "__main__":
    main()
