"""TensorBoard over a finished sweep, as a real browser shows it; W&B's runs, as its own reader and agent see them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPO, SHORT, tensorboard
from selenium.common.exceptions import WebDriverException
from sweeps import NAMES
from wandb.wandb_agent import Agent

METRICS = ["val/acc", "test/acc", "val/loss", "test/loss"]
ALL_TEXT = """
const texts = []
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot)
  for (const child of node.childNodes) {
    if (child.nodeType == 3) texts.push(child.textContent.trim())
    else if (!/SCRIPT|STYLE/.test(child.nodeName)) walk(child)
  }
}
walk(document.body)
return texts.filter(text => text)
"""
ALL_PICTURES = (
    ALL_TEXT.replace("if (child.nodeType == 3) texts.push(child.textContent.trim())", "")
    .replace(
        "if (node.shadowRoot)", "if (node.nodeName == 'IMG') texts.push(node.naturalWidth)\n  if (node.shadowRoot)"
    )
    .replace("else if", "if")
)


@pytest.fixture(scope="module")
def server(tiny):
    with tensorboard(tiny[0] / "logs/sweeps/tiny") as (url, get):
        yield url, get


def see(browser, url: str, enough, script: str = ALL_TEXT) -> list:
    """Opens a page and waits until what it shows is enough."""
    browser.get("about:blank")
    browser.get(url)
    end = time.monotonic() + 60
    while True:
        shown = []
        with contextlib.suppress(WebDriverException):  # the page is still being built
            shown = browser.execute_script(script)
            if enough(shown):
                return shown
        assert time.monotonic() < end, shown
        time.sleep(0.5)


def shows(*wanted: str):
    return lambda texts: all(text in " ".join(texts) for text in wanted)


def test_hparams_has_all_runs_with_what_was_swept_and_the_four_metrics(tiny, server, browser):
    experiment = server[1]("plugin/hparams/experiment", {})
    assert [info["name"] for info in experiment["hparamInfos"]] == ["l1_chan", "nesterov"]
    shown = see(browser, f"{server[0]}/#hparams", shows(*NAMES))
    for name, values in zip(NAMES, (("4.0000", "false"), ("4.0000", "true"), ("8.0000", "false"), ("8.0000", "true"))):
        row = shown[shown.index(name) :][: 1 + len(values) + len(METRICS)]
        metrics = json.loads((tiny[0] / "logs/sweeps/tiny" / name / "metrics.json").read_text())
        assert row[1:3] == list(values)
        assert [float(text) for text in row[3:]] == pytest.approx([metrics[key] for key in METRICS], rel=1e-4)


def test_scalars_have_each_run_and_the_metrics(server, browser):
    shown = see(browser, f"{server[0]}/#scalars&tagFilter=val", shows("tag: val/loss", "tag: val/acc"))
    assert set(NAMES) <= set(shown)


def test_custom_scalars_have_training_and_validation_together(server, browser):
    shown = see(browser, f"{server[0]}/#custom_scalars", shows("train and val", "Matches"))
    assert {"loss", "acc", *NAMES} <= set(shown)


def test_histograms_have_the_names_of_the_layers(server, browser):
    see(browser, f"{server[0]}/#histograms&tagFilter=conv1", shows("tag: act/net.conv1", *NAMES))
    tags = server[1]("plugin/histograms/tags")[NAMES[0]]
    assert {tag.partition("/")[0] for tag in tags} == {"act", "grad", "param"}
    assert {"param/net.conv1.weight", "grad/net.fc2.bias"} <= set(tags)


def test_images_are_shown(server, browser):
    see(browser, f"{server[0]}/#images", shows("tag: test/confusion_matrix", "tag: test/worst_classified"))
    widths = see(browser, f"{server[0]}/#images", lambda widths: len([w for w in widths if w]) == 8, ALL_PICTURES)
    assert min(width for width in widths if width) >= 600


def test_the_graph_shows_the_net(server, browser):
    shown = see(browser, f"{server[0]}/#graphs", lambda texts: any("CNN" in text for text in texts))
    assert set(NAMES) <= set(shown)


# W&B


def leet(folder: Path, *options: str) -> list[dict]:
    """What W&B's own reader says of an offline run."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(done.stdout)] if options else [json.loads(line) for line in done.stdout.splitlines()]


def test_wandb_has_each_run_with_name_group_command_and_what_was_swept(tiny):
    shown = {}
    for folder in (tiny[0] / "logs/wandb").glob("offline-run-*"):
        records = {record["type"]: record[record["type"]] for record in reversed(leet(folder)[:5])}
        assert (records["run"]["project"], records["run"]["run_group"]) == ("mnist", "tiny")
        config = leet(folder, "--summary")[0]["config"]
        assert not [key for key in config if "." in key]  # each setting once
        net, optimizer = (config["model"]["init_args"][key]["init_args"] for key in ("net", "optimizer"))
        name = records["run"]["display_name"]
        shown[name] = f"{name[:3]}-l1_chan={net['l1_chan']}-nesterov={json.dumps(optimizer['nesterov'])}"
        assert records["environment"]["program"] == "main.py"
        assert f"--config=logs/sweeps/tiny/configs/{name}.yaml" in records["environment"]["args"]
    assert sorted(shown) == NAMES and all(name == told for name, told in shown.items())


def test_an_agent_of_a_wandb_sweep_runs_main(folder, monkeypatch):
    for name in ("main.py", "mnist_cnn", "configs", "data"):
        (folder / name).symlink_to(REPO / name)
    content = yaml.safe_load((REPO / "configs/wandb_sweep.yaml").read_text())
    for name, value in {"MODE": "offline", "SWEEP_ID": "search", "DIR": str(folder)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("RUN_ID", "SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(f"WANDB_{name}", "")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    agent = Agent(api=None, queue=None)
    agent._sweep_command = [*content["command"], *SHORT]
    values = {"model.net.l1_chan": 8, "model.optimizer.lr": 0.0123, "model.optimizer.nesterov": True}
    assert values.keys() == content["parameters"].keys()
    arguments = {key: {"value": value} for key, value in values.items()}
    agent._command_run({"run_id": "first", "program": content["program"], "args": arguments})
    assert agent._run_processes["first"].wait() == 0
    (told,) = leet(folder / "logs/wandb/latest-run", "--summary")
    assert told["run_id"] == "first" and values.items() <= told["config"].items()
    model = told["config"]["model"]["init_args"]
    assert model["net"]["init_args"]["l1_chan"] == 8
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["nesterov"]) == (0.0123, True)
    metrics = json.loads((folder / "logs/mnist/version_0/metrics.json").read_text())
    assert told["summary"][content["metric"]["name"]] == pytest.approx(metrics["val/acc"])
