"""Write the JSON schema of params.yaml: `python -m tools.schema`. Editors take their hints from it.

Types and limits are those of pipeline/config.py, descriptions the comments of presets/digits.yaml.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.infra.atomic_io import write_text
from tools.command import command

SCHEMA = Path("presets/params.schema.json")
COMMENTED = Path("presets/digits.yaml")
KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: [^#]*)?(?:# (?P<comment>.*))?$")


def comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each key's path, and the comment behind it."""
    section = ""
    for line in text.splitlines():
        if (match := KEY.match(line)) is None:
            continue
        if not match["indent"]:
            section = match["key"]
        if match["comment"]:
            yield ((section, match["key"]) if match["indent"] else (section,)), match["comment"].strip()


def schema() -> dict[str, Any]:
    """Of params.yaml as a whole."""
    content = Params.model_json_schema()
    content["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for part in (content, *content["$defs"].values()):
        for value in part.get("properties", {}).values():
            value.pop("title", None)  # the key again
    for (first, *rest), comment in comments(COMMENTED.read_text(encoding="utf-8")):
        value = content["properties"][first]
        if rest:
            value = content["$defs"][value["$ref"].rpartition("/")[2]]["properties"][rest[0]]
        value["description"] = comment
    return content


def as_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@command()
def main(arguments: argparse.Namespace) -> None:
    write_text(SCHEMA, as_text())
    print(f"schema: {SCHEMA}")


if __name__ == "__main__":
    main()
