"""W&B with a key, as its server, its agent and its modes see a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from conftest import FIT, REPO, RUN, SHORT, error_of, main, metrics_of
from wandb.wandb_agent import Agent

FEW = [*FIT, "--tensorboard=null", "--trainer.max_epochs=1", "--trainer.limit_train_batches=8"]


@pytest.fixture(autouse=True)
def own_wandb():
    """W&B reads its environment once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def summary_of(run: Path) -> dict:
    """An offline run, as W&B's own reader gives it."""
    read = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", "--summary", str(run)]
    return json.loads(subprocess.run(read, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_a_server_that_cannot_be_reached_costs_a_line(folder, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    main(FEW)
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if line.strip() and "Trainer.fit" not in line]
    assert len(lines) == 1 and "W&B" in lines[0] and "offline" in lines[0], lines
    assert "wandb sync logs/wandb/offline-run-" in output.out
    (run,) = folder.glob("logs/wandb/offline-run-*")
    assert summary_of(run)["summary"]["val/acc"] == metrics_of(RUN)["val/acc"]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_mode_wins(folder, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    main(FEW)
    assert len(list(folder.glob("logs/wandb/offline-run-*"))) == (mode == "offline")


def test_an_unknown_mode(folder, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "foo")
    assert "foo" in error_of(capfd, *FIT)
    assert list(folder.iterdir()) == []


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
    run = summary_of(folder / "logs/wandb/latest-run")
    assert run["run_id"] == "first" and values.items() <= run["config"].items()
    model = run["config"]["model"]["init_args"]
    assert model["net"]["init_args"]["l1_chan"] == 8
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["nesterov"]) == (0.0123, True)
    assert run["summary"][content["metric"]["name"]] == pytest.approx(metrics_of(RUN)["val/acc"])
