"""Runs of several nodes, each a process here: as torchrun or one's own script starts them."""

import os
import socket
import subprocess
import sys

from conftest import FIT, REPO

TWO = ["--trainer.num_nodes=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--num_threads=1"]


def test_two_nodes_make_one_run_that_is_that_of_two_devices(folder):
    """One folder, the same weights and metrics; its config.yaml evaluates alike on one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for rank in (0, 1):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        command = [sys.executable, str(REPO / "main.py"), *FIT, *TWO, "--wandb=null"]
        nodes.append(
            subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    run = folder / "logs/mnist/version_0"
    assert [path.name for path in (folder / "logs/mnist").iterdir()] == ["version_0"]
    assert len(list(run.glob("events.*"))) == 1
    assert "The run, with its" in printed[0] and "The run, with its" not in printed[1]
