"""The schema that editors use: configs of any form are valid, misspelt keys and classes are not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO, printed_config
from jsonschema import Draft202012Validator
from test_cli import GRIDS

CONFIGS = [path for path in sorted((REPO / "configs").glob("*.yaml")) if path.name not in GRIDS]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    command = [sys.executable, "-m", "mnist_cnn.run.schema"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    document = json.loads(result.stdout)
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


def model(**init_args: Any) -> dict[str, Any]:
    return {"model": {"class_path": "LitClassifier", "init_args": init_args}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path, schema: Draft202012Validator) -> None:
    schema.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("name", ["base", "best"])
def test_a_complete_config_is_valid(name: str, schema: Draft202012Validator, capfd: Any) -> None:
    schema.validate(yaml.safe_load(printed_config(capfd, "fit", f"--config={REPO}/configs/{name}.yaml")))


@pytest.mark.parametrize(
    "config",
    [
        model(net="CNN"),
        model(net="mnist_cnn.nets.CNN", optimizer={"class_path": "SGD"}),
        model(net={"class_path": "my_nets.MLP", "init_args": {"hidden": 3}}),  # imported by nobody yet
        model(lr_scheduler={"class_path": "StepLR", "init_args": {"step_size": 3}}),
        {"model": {"net": {"l1_chan": 8}}},
        {"progress_bar": {"refresh_rate": 5}},
        {"trainer": {"callbacks": [{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}]}},
    ],
    ids=str,
)
def test_other_forms_are_valid(config: dict[str, Any], schema: Draft202012Validator) -> None:
    schema.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"early_stoping": {"patience": 3}},
        {"early_stopping": {"patiense": 3}},
        {"trainer": {"max_epoch": 3}},
        {"trainer": {"max_epochs": "many"}},
        {"data": "MNISTDataModul"},
        model(net="CNM"),
        model(net={"init_args": {"l1_chn": 8}}),
        model(optimizer={"class_path": "SGD", "init_args": {"lrr": 0.1}}),
        model(optimizer={"class_path": "SGD", "init_args": {"lr": "fast"}}),
        model(lr_scheduler={"class_path": "OneCycleLR", "init_args": {"max_lrr": 0.1}}),
        model(net="Linear"),  # torch has several
    ],
    ids=str,
)
def test_mistakes_are_found(config: dict[str, Any], schema: Draft202012Validator) -> None:
    assert not schema.is_valid(config)
