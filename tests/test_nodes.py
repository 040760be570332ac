"""Runs of several nodes, each of them a process here that one starts oneself; test_slurm.py has SLURM start them."""

import os
import socket
import subprocess

from conftest import FIT, assert_same_weights, in_new_process, metrics_of, start

TWO = ["--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--num_threads=1", "--wandb=null"]
METRICS = ["--trainer.limit_val_batches=1.0", "--trainer.max_epochs=1"]


def test_two_nodes_make_the_run_of_two_devices(folder, monkeypatch):
    """One folder and one file of events, the same metrics and weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or else Lightning gives each process its share of the node's cores
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for rank in range(2):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
        args = [*FIT, *TWO, *METRICS, "--trainer.num_nodes=2"]
        nodes.append(start("main.py", *args, env=os.environ | own, stderr=subprocess.STDOUT))
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    run = folder / "logs/mnist/version_0"
    assert [path.name for path in (folder / "logs/mnist").iterdir()] == ["version_0"]
    assert len(list(run.glob("events.*"))) == 1
    assert ["The run, with its" in text for text in printed] == [True, False]
    in_new_process("fit", f"--config={run / 'config.yaml'}", "--trainer.num_nodes=1", "--trainer.devices=2")
    other = folder / "logs/mnist/version_1"
    assert metrics_of(run) == metrics_of(other)
    assert_same_weights(run, other)
