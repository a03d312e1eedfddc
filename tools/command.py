"""The command line of the tools: bad usage, and what a user can mend, end in one line."""

import argparse
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.infra.errors import UserError, explain
from pipeline.infra.safe_io import printable


class Parser(argparse.ArgumentParser):
    """Shows a description as it is written; an error is one line, and status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawTextHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        """End with the message."""
        self.exit(2, f"error: {printable(' '.join(message.split()))}; `--help` says what there is\n")


@contextmanager
def mendable() -> Iterator[None]:
    """End with status 1 and one line on a bad name, a file that can't be used, a program that fails."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["see above"]
        command = " ".join(map(str, error.cmd))
        raise SystemExit(
            f"error: `{command}` failed ({printable(said[-1])}); mend that, and repeat"
        ) from None
    except OSError as error:
        raise SystemExit(f"error: {explain(error) or error}") from None
