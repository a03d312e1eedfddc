"""The frame of every command line: its options, and one line for an error that the user can mend."""

import argparse
import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.infra.errors import UserError, explain
from pipeline.infra.safe_io import printable

Main = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """Shows a description as it is written; a usage error is one line, and status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawTextHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(' '.join(message.split()))}; `--help` says what there is\n")


def command(
    add_options: Callable[[Parser], None] | None = None, *, intermixed: bool = False
) -> Callable[[Main], Callable[[], None]]:
    """Make a function that takes parsed options the `main` of its module.

    The module's docstring is the text of `--help`. Bad usage ends with status 2; a UserError, a file
    that can't be used or a program that fails with status 1; Ctrl-C with 130. Each prints one line.
    """

    def decorate(main: Main) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            parser = Parser(description=main.__globals__["__doc__"])
            if add_options is not None:
                add_options(parser)
            arguments = parser.parse_intermixed_args() if intermixed else parser.parse_args()
            with one_line_errors():
                main(arguments)

        return run

    return decorate


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line instead of a traceback, where the user can mend the cause."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except subprocess.CalledProcessError as error:
        last_line = ((error.stderr or "").strip().splitlines() or ["see above"])[-1]
        program = " ".join(map(str, error.cmd))
        raise SystemExit(
            f"error: `{program}` failed ({printable(last_line)}); mend that, and repeat"
        ) from None
    except OSError as error:
        raise SystemExit(f"error: {explain(error) or error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
