"""Sweeps and single runs as jobs of a real SLURM with two nodes on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sweeps
from conftest import QUIET, REPO, SHORT, metrics_of, wait_for
from sweeps import FOREIGN, SWEEP, grid, less_times, settings, statuses, trained

SLURM = ["--launcher=slurm", "--slurm.poll=1"]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM that runs two jobs at once, for this process and those that it starts."""
    for command in ("sbatch", "slurmctld", "slurmd", "munged"):
        if not shutil.which(command):
            pytest.skip(f"no {command}: Debian's packages are slurm-wlm and munge")
    if os.geteuid():
        pytest.skip("only root can start SLURM's daemons")
    pytest.importorskip("submitit", reason="no submitit: pip install '.[cluster]'")
    folder = tmp_path_factory.mktemp("slurm")
    script = [str(REPO / "tests/stress/slurm.sh")]
    try:
        subprocess.run([*script, "start", str(folder)], check=True, timeout=60)
        yield folder
    finally:
        subprocess.run([*script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture(autouse=True)
def environment(cluster, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("SLURM_CONF", str(cluster / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{cluster}/bin:{os.environ['PATH']}")
    yield
    subprocess.run(["scontrol", "update", "PartitionName=main", "State=UP"], check=True)
    subprocess.run(["scancel", "--user=root"], check=True)


def submitted(process: subprocess.Popen) -> str:
    """The job number that a sweep prints."""
    for line in process.stdout:
        if found := re.search(r"submitted \d+ runs to SLURM: squeue --jobs=(\d+)", line):
            return found[1]
    pytest.fail(f"nothing was submitted: {process.communicate()}")


def jobs(*options: str) -> list[str]:
    """States of the jobs that SLURM has."""
    shown = subprocess.run(["squeue", "--noheader", "--array", "--format=%T", *options], capture_output=True, text=True)
    return shown.stdout.split()


def test_a_sweep_gives_the_numbers_of_a_local_one_though_a_run_is_requeued(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO / "tests"))
    waits = [{"class_path": "probes.WaitWhile", "init_args": {"path": "held"}}]
    axes = {"model.optimizer.nesterov": [False, True]}
    args = [*settings(folder, grid=axes, launcher="slurm", slurm={"poll": 1})]
    args.append(f"--fixed.trainer.callbacks={json.dumps(waits)}")
    os.makedirs("local")
    shutil.copy("tiny.yaml", "local")
    done = sweeps.in_new_process(*args, "--launcher=local", cwd="local")
    assert done.returncode == 0, done.stderr
    Path("held").touch()
    process = sweeps.start(*args)
    job = submitted(process)
    wait_for(lambda: list(SWEEP.glob("001-*/config.yaml")), process)
    subprocess.run(["scontrol", "requeue", f"{job}_1"], check=True)
    wait_for(lambda: not {"RUNNING", "COMPLETING"} & set(jobs(f"--jobs={job}_1")), process)
    os.remove("held")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert less_times(SWEEP / "results.csv") == less_times("local" / SWEEP / "results.csv")
    assert "2 of 2 runs are finished" in printed and (SWEEP / "report.html").is_file()
    shown = subprocess.run(["scontrol", "show", "job", f"{job}_1"], capture_output=True, text=True, check=True).stdout
    assert "Restarts=1 " in shown
    for log in SWEEP.glob("*/output.log"):
        assert "warn" not in log.read_text().lower()


def test_jobs_continue_after_ctrl_c_and_the_same_command_repeats_no_finished_run(foreign, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    args = [*FOREIGN, *SLURM, grid(model__fault=["x", "y"]), '--slurm.options={"comment": "of mine"}']
    subprocess.run(["scontrol", "update", "PartitionName=main", "State=DOWN"], check=True)
    process = sweeps.start(*args)
    job = submitted(process)
    script = (SWEEP / f".locks/slurm/{job}_submission.sh").read_text()
    assert re.search(r"^#SBATCH --comment=.*of mine", script, re.MULTILINE)
    assert not [path for path in SWEEP.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    process.send_signal(2)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"the jobs continue; to cancel them: scancel {job}" in printed and "the same command continues" in printed
    subprocess.run(["scontrol", "update", "PartitionName=main", "State=UP"], check=True)
    done = sweeps.in_new_process(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: not jobs())
    assert statuses() == ["finished"] * 2 and len(trained()) == 2
    done = sweeps.in_new_process(*args)
    assert done.returncode == 0 and "submitted" not in done.stdout


def test_failed_runs_are_named_with_their_logs(foreign):
    args = [*FOREIGN, *SLURM, grid(model__fault=["exit", "wait", "x"]), "--max_failures=9"]
    process = sweeps.start(*args)
    job = submitted(process)
    wait_for(lambda: any("fault=wait" in line for line in trained()), process)
    subprocess.run(["scancel", f"{job}_1"], check=True)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1, printed
    assert statuses() == ["failed", "failed", "finished"]
    assert (
        "failed: 000-fault=exit: this fault was asked for (see logs/sweeps/tiny/000-fault=exit/output.log)" in printed
    )
    assert f"failed: 001-fault=wait: SLURM job {job}_1 ended: cancelled (" in printed


def test_too_many_failures_cancel_the_rest(foreign):
    rates = [rate / 100 for rate in range(1, 9)]  # more than can fail before the first failure is noticed
    args = [*FOREIGN, *SLURM, "--slurm.runs_at_once=1", "--max_failures=1", grid(model__lr=rates)]
    done = sweeps.in_new_process(*args, "--fixed.model.fault=exit")
    assert done.returncode == 1 and "too many runs failed in a row" in done.stderr, done.stdout
    wait_for(lambda: not jobs())
    assert statuses()[0] == "failed" and statuses()[-1] == "pending"


MISTAKES = {
    "partition": ("--slurm.partition=nix", "invalid partition specified: nix"),
    "option": ("--slurm.options.qoss=x", "unrecognized option '--qoss=x'"),
}


@pytest.mark.parametrize("argument, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_what_slurm_refuses_is_one_line(foreign, capfd, argument, message):
    line = sweeps.error_of(capfd, *FOREIGN, *SLURM, argument, grid(model__lr=[0.1, 0.2]))
    assert line.startswith("error: SLURM refuses the jobs: ") and message in line


def test_missing_commands_and_packages_are_reported_before_anything_is_written(foreign, monkeypatch, capfd):
    args = [*FOREIGN, "--launcher=slurm", grid(model__lr=[0.1])]
    line = "error: launcher slurm needs SLURM's commands on PATH, and submitit: pip install '.[cluster]'"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(foreign))
        assert sweeps.error_of(capfd, *args) == line
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert sweeps.error_of(capfd, *args) == line
    assert not Path("logs").exists()


def test_the_documented_job_of_two_nodes_continues_when_it_is_requeued(cluster, folder, monkeypatch):
    page = (REPO / "docs/cluster.md").read_text()
    Path("nodes.yaml").write_text(re.search(r"```yaml\n(# nodes.yaml.*?)```", page, re.DOTALL)[1])
    Path("mnist.sbatch").write_text(re.search(r"```bash\n(#!/bin/bash.*?)```", page, re.DOTALL)[1])
    for name in ("main.py", "mnist_cnn", "configs", "data"):
        os.symlink(REPO / name, name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes' names are known to SLURM alone
    here = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    settings = [
        "--trainer.devices=1",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=20",  # some seconds, within which it is requeued
        "--early_stopping=null",
        "--num_threads=1",
        *SHORT[1:],
    ]
    submitted = subprocess.run(
        ["sbatch", "--parsable", *here, "mnist.sbatch", *settings, *QUIET], capture_output=True, text=True
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    root = Path("logs/mnist", job)

    wait_for((root / "version_0/checkpoints/last.ckpt").exists, log := Path(f"mnist-{job}.log"))
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for((root / "version_1/metrics.json").exists, log)
    assert sorted(os.listdir(root)) == ["version_0", "version_1"]
    assert (
        (root / "version_1/config.yaml")
        .read_text()
        .startswith(f"# resumed from {root}/version_0/checkpoints/last.ckpt")
    )
    assert metrics_of(root / "version_1")["epochs"] == 20 and not (root / "version_0/metrics.json").exists()
    assert "MEMBER: 2/2" in log.read_text() and re.search(r"20 epochs \(\d+ of them new\) in", log.read_text())
