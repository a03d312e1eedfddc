"""Put a preset in place of params.yaml: `make preset NAME=cifar10_resnet32` (`preset-show` prints it).

presets/digits.yaml is whole and holds the defaults; the other presets hold what differs from them.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline import config
from pipeline.config import Loader, Params, flatten
from pipeline.infra.atomic_io import write_text
from pipeline.infra.errors import UserError
from tools.command import Parser, command

PRESETS = Path("presets")
DEFAULTS = "digits.yaml"
PARAMS = Path("params.yaml")


def load(name: str, folder: Path = PRESETS) -> Params:
    """The parameters of a preset: the defaults with the preset's values.

    Raises:
        UserError: there is no such preset, or it has a key or value that can't be used.
    """
    path = _path(name, folder)
    return config.check(_merge(config.read(folder / DEFAULTS), config.read(path)), path)


def whole_text(name: str, folder: Path = PRESETS) -> str:
    """The whole file of a preset: its header, then the defaults' text with its values put in.

    A comment beside a value in the preset takes the place of the default's. A preset that has every key
    (the defaults, or a copy of params.yaml) is already whole.

    Raises:
        UserError: there is no such preset, or it has a key or value that can't be used.
    """
    load(name, folder)
    path = _path(name, folder)
    preset, text = (p.read_text(encoding="utf-8") for p in (path, folder / DEFAULTS))
    values = dict(flatten(config.read(path)))
    root, spans = _root(preset), dict(_spans(_root(text)))
    if spans.keys() == values.keys():
        return preset
    comments = {key: comment for key, (_, end) in _spans(root) if (comment := _comment(preset, end))}
    for key in sorted(values, key=lambda key: spans[key], reverse=True):  # the last first: places stay
        start, end = spans[key]
        value = yaml.safe_dump([values[key]], default_flow_style=True, width=10**6)[1:-2]
        old_comment = _comment(text, end)
        rest = end + len(old_comment)
        text = text[:start] + value + comments.get(key, old_comment) + text[rest:]
    header = preset[: root.start_mark.index].strip()
    return f"{header}\n\n{text}" if header else text


def use(name: str) -> None:
    """Write params.yaml anew, unless it holds changes that are in no preset.

    Raises:
        UserError: there is no such preset, it can't be used, or changes would be lost.
    """
    text = whole_text(name)
    if PARAMS.exists() and PARAMS.read_bytes() not in set(_written()):
        raise UserError(
            f"{PARAMS} was changed and would be lost; keep it (`cp params.yaml presets/mine.yaml`) or "
            "give it up (`rm params.yaml`), then repeat"
        )
    write_text(PARAMS, text)


def _written() -> Iterator[bytes]:
    """What params.yaml may be without anything in it being lost."""
    for path in PRESETS.glob("*.yaml"):
        yield path.read_bytes()
        try:
            yield whole_text(path.stem).encode()
        except UserError:  # one of the user's own, which nobody asked for here
            continue


def _path(name: str, folder: Path) -> Path:
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"there is no preset {name!r}; choose {', '.join(known)}")
    return folder / f"{name}.yaml"


def _merge(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _root(text: str) -> yaml.MappingNode:
    node = yaml.compose(text, Loader)
    assert isinstance(node, yaml.MappingNode)  # as config.read has seen
    return node


def _spans(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Where each value begins and ends in a file, under its dotted key."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from _spans(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", (value.start_mark.index, value.end_mark.index)


def _comment(text: str, end: int) -> str:
    """What follows a value in its line, when it is a comment."""
    rest = text[end:].split("\n", 1)[0]
    return rest if rest.lstrip().startswith("#") else ""


def add_options(parser: Parser) -> None:
    parser.add_argument("name", help="of a file in presets/, without .yaml")
    parser.add_argument("--show", action="store_true", help="print the whole file and write nothing")


@command(add_options)
def main(arguments: argparse.Namespace) -> None:
    if arguments.show:
        print(whole_text(arguments.name), end="")
        return
    use(arguments.name)
    print(f"{PARAMS} is now {arguments.name}; run `make repro`")


if __name__ == "__main__":
    main()
