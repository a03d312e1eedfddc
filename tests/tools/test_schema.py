"""The JSON schema of params.yaml: as config.py has it, with a hint for every key."""

import copy
import json

import pytest
import yaml
from sandbox import ROOT

from tools import preset, schema
from tools.schema import SCHEMA


@pytest.fixture
def content(monkeypatch) -> dict:
    monkeypatch.chdir(ROOT)
    return schema.schema()


def test_the_file_is_in_step_with_config(content):
    assert (ROOT / SCHEMA).read_text() == schema.as_text(), "run `python -m tools.schema`"


def test_most_keys_have_a_description(content):
    sections = [content["$defs"][s["$ref"].rpartition("/")[2]] for s in content["properties"].values()
                if "$ref" in s]  # fmt: skip
    keys = [value for section in sections for value in section["properties"].values()]
    assert sum("description" in key for key in keys) > 0.6 * len(keys)
    assert content["properties"]["gamma"]["type"] == "number"
    assert all("\n" not in key.get("description", "") for key in keys)


@pytest.mark.slow  # jsonschema comes with the servers of `make slow`
def test_it_accepts_every_preset_and_refuses_what_config_refuses(content):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(content)
    for path in sorted((ROOT / "presets").glob("*.yaml")):
        assert list(validator.iter_errors(yaml.safe_load(preset.whole_text(path.stem)))) == [], path
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, key, value in (("resnet", "depth", 0), ("finetune", "lr", "0.1"), ("data", "x", 1)):
        wrong = copy.deepcopy(params)
        wrong[section][key] = value
        assert list(validator.iter_errors(wrong)) != [], (section, key)
    assert json.loads((ROOT / SCHEMA).read_text())["additionalProperties"] is False
