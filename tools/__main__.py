"""Every command of this repository by one name: `blockdrop COMMAND`, or `python -m tools COMMAND`.

`blockdrop COMMAND --help` explains one. They belong to a checkout: start them in its folder.
`source <(blockdrop completion bash)` completes commands and options (zsh and tcsh likewise).
"""

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path

from tools.command import Parser

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "preset": "tools.preset",
    "import": "tools.import_checkpoint",
    "predict": "tools.predict",
    "demo": "tools.demo",
    "export": "tools.export",
    "bench": "research.speed",
    "sync": "tools.sync",
    "ui": "tools.ui",
    "front": "tools.front",
    "study": "tools.study",
    "promote": "tools.promote",
    "submit": "tools.submit",
}
SHELLS = ("bash", "zsh", "tcsh")


def summary(module: str) -> str:
    """The first sentence of a module's docstring, without importing the module."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    text = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return re.split(r":? \(?`", " ".join(text.split()))[0].rstrip(".")


def make_parser(*, complete: bool) -> Parser:
    """The commands; with all of their options, whose modules take seconds to import, if `complete`."""
    parser = Parser(prog="blockdrop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        described = commands.add_parser(name, help=summary(module))
        if complete and (add_options := getattr(importlib.import_module(module), "add_options", None)):
            add_options(described)
    completion = commands.add_parser("completion", help="Print a shell's completion of all commands")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def main() -> None:
    """Hand the words after the command's name to its module."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in COMMANDS:
        sys.argv = [f"blockdrop {name}", *words]
        importlib.import_module(COMMANDS[name]).main()
        return
    arguments: argparse.Namespace = make_parser(complete=False).parse_args([name, *words])
    import shtab  # DVC brings it

    print(shtab.complete(make_parser(complete=True), shell=arguments.shell))


if __name__ == "__main__":
    main()
