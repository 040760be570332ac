"""Sweeps and single runs as jobs of a real SLURM, of one node on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sweeps
from conftest import QUIET, REPO, SHORT, metrics_of, wait_for
from sweeps import LOSS, grid, less_times, rows, settings
from test_secrets import KEY, leaks

import sweep

RUNS = Path("logs/sweeps/tiny")
SLURM = ["--launcher=slurm", "--slurm.poll=1"]
FOREIGN = [*LOSS, "--name=tiny", "--base=[]"]


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
    script = [str(REPO / "tests/slurm.sh")]
    try:
        subprocess.run([*script, "start", str(folder)], check=True, timeout=60)
        yield folder
    finally:
        subprocess.run([*script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture(autouse=True)
def environment(monkeypatch, request):
    """Jobs of a thread each; no output that waits in a buffer."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    if "cluster" in request.fixturenames:
        monkeypatch.setenv("SLURM_CONF", str(request.getfixturevalue("cluster") / "slurm.conf"))


def trained() -> list[str]:
    """The runs of foreign.py that began to train, each as often as it did."""
    return Path("trained.txt").read_text().split() if os.path.exists("trained.txt") else []


def line_of(process: subprocess.Popen) -> str:
    """The next line that it prints, if it does so within three minutes."""
    timer = threading.Timer(180, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    assert line, process.communicate()
    return line


def jobs(*options: str) -> list[str]:
    """States of the jobs that SLURM has."""
    shown = subprocess.run(["squeue", "--noheader", "--array", "--format=%T", *options], capture_output=True, text=True)
    return shown.stdout.split()


def test_a_sweep_gives_what_a_local_one_gives_though_one_run_is_requeued_and_one_preempted(
    cluster, folder, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(REPO / "tests"))
    waits = [{"class_path": "moments.WaitWhile", "init_args": {"path": "held"}}]
    axes = {"model.optimizer.nesterov": [False, True]}
    args = [*settings(folder, grid=axes, launcher="slurm", slurm={"poll": 1}), "--fixed.num_threads=1"]
    args.append(f"--fixed.trainer.callbacks={json.dumps(waits)}")
    os.makedirs("local")
    shutil.copy("tiny.yaml", "local")
    done = sweeps.in_new_process(*args, "--launcher=local", cwd="local")
    assert done.returncode == 0, done.stderr
    Path("held").touch()
    process = sweeps.start(*args)
    job = re.search(r"job (\d+)", line_of(process))[1]

    def disturb(number: str, command: str) -> None:
        """While it trains, which it may go on with until it is killed; returns when it has ended."""
        wait_for(lambda: list(RUNS.glob(f"{number}-*/config.yaml")), process)
        subprocess.run(command, shell=True, check=True)
        wait_for(lambda: not {"RUNNING", "COMPLETING"} & set(jobs(f"--jobs={job}_{int(number)}")), process)

    node = f"$(squeue --noheader --jobs={job}_0 --format=%N)"
    disturb("000", f"sbatch --partition=urgent --nodelist={node} --output=urgent.log --wrap=true")
    disturb("001", f"scontrol requeue {job}_1")
    os.remove("held")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert "submitted 1 runs" in printed and "failed" not in printed
    assert less_times(RUNS / "results.csv") == less_times("local" / RUNS / "results.csv")
    assert "2 of 2 runs are finished" in printed and (RUNS / "report.html").is_file()
    shown = subprocess.run(["scontrol", "show", "job", f"{job}_1"], capture_output=True, text=True, check=True).stdout
    assert "Restarts=1 " in shown
    told = [line for log in RUNS.glob("*/output.log") for line in log.read_text().splitlines()]
    assert not [line for line in told if "warn" in line.lower() and not line.startswith("submitit ")]


def test_the_jobs_go_on_without_the_sweep(cluster, foreign, monkeypatch, request):
    """After the login shell's end and after Ctrl-C; nothing is submitted twice, whoever follows. No key is kept."""
    args = [*FOREIGN, *SLURM, grid(model__fault=["x", "y", "z"]), '--slurm.options={"mem": 0, "comment": "of mine"}']
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    partition = ["scontrol", "update", "PartitionName=main"]
    subprocess.run([*partition, "State=DOWN"], check=True)  # jobs are taken, but none begins
    request.addfinalizer(lambda: subprocess.run([*partition, "State=UP"], check=True))
    process = sweeps.start(*args)
    job = re.search(r"job (\d+)", line_of(process))[1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (script,) = RUNS.glob(f".locks/slurm/{job}_*.sh")
    assert re.search(r"^#SBATCH --mem=0$", script.read_text(), re.MULTILINE)
    assert re.search(r"^#SBATCH --comment=.*of mine", script.read_text(), re.MULTILINE)
    assert leaks(foreign, KEY) == []
    process = sweeps.start(*args)
    assert line_of(process) == f"3 runs are with SLURM: squeue --jobs={job}\n"
    os.kill(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"the jobs go on: scancel {job} ends them" in printed and "the same command goes on" in printed
    subprocess.run([*partition, "State=UP"], check=True)
    both = sweeps.start(*args), sweeps.start(*args)
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "submitted" not in "".join(printed)
    assert [row["status"] for row in rows()] == ["finished"] * 3
    assert len(trained()) == 3


def test_a_mistake_ends_the_following_and_no_job(cluster, foreign):
    args = [*FOREIGN, *SLURM, "--slurm.runs_at_once=1", grid(model__fault=["x", "pause", "y"])]
    done = sweeps.in_new_process(*args, "--metric=los")
    assert done.returncode == 1 and "reports no metric los (did you mean loss?)" in done.stderr
    assert "2 of 3" not in done.stdout
    done = sweeps.in_new_process(*args)
    assert done.returncode == 0 and "submitted" not in done.stdout, done.stdout
    assert len(trained()) == 3


def test_the_end_of_its_time_is_told(cluster, foreign):
    """A minute, the least that there is; from a shell that is a job itself."""
    own = os.environ | {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "100"}
    args = [*FOREIGN, *SLURM, "--slurm.time=1", grid(model__fault=["wait"])]
    done = sweeps.in_new_process(*args, env=own)
    assert done.returncode == 1
    assert re.search(r"^000-fault=wait failed: job \d+ is timeout \(see ", done.stdout, re.MULTILINE), done.stdout


def test_failed_runs_are_told_with_their_logs(cluster, foreign):
    """Whatever it was; and they are tried again when they are asked for again."""
    args = [*FOREIGN, *SLURM, grid(model__fault=["exit", "kill", "wait", "x", "nan"]), "--max_failures=9"]
    process = sweeps.start(*args)
    job = re.search(r"job (\d+)", line_of(process))[1]
    wait_for(lambda: any("fault=wait" in line for line in trained()), process)
    subprocess.run(["scancel", f"{job}_2"], check=True)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1, printed
    assert [row["status"] for row in rows()] == ["failed", "failed", "failed", "finished", "failed"]
    for name, reason in {
        "000-fault=exit": "this fault was asked for",
        "001-fault=kill": "Killed",
        "002-fault=wait": f"job {job}_2 is cancelled",
        "004-fault=nan": "diverged: loss is nan",
    }.items():
        log = RUNS / name / "output.log"
        assert f"failed: {name}: {reason} (see {log})" in printed
        assert log.stat().st_size
    done = sweeps.in_new_process(*args, "--retry_failed=false")
    assert done.returncode == 1 and "submitted" not in done.stdout and len(trained()) == 5


def test_a_fault_before_all_runs_is_told_and_cancels_the_rest(cluster, foreign):
    Path("cloudpickle.py").write_text(
        "raise ImportError('not here')\n"
    )  # of the jobs alone, which begin in this folder
    rates = [rate / 100 for rate in range(1, 13)]  # more than can fail until the first failure is seen
    args = [*FOREIGN, *SLURM, "--slurm.runs_at_once=1", "--max_failures=1", grid(model__lr=rates)]
    done = sweeps.in_new_process(*args)
    assert done.returncode == 1 and "stopped, since 1 runs failed in a row" in done.stderr
    assert "failed: 000-lr=0.01: ImportError: not here (see logs/sweeps/tiny/000-lr=0.01/output.log)" in done.stdout
    assert "Traceback" in (RUNS / "000-lr=0.01/output.log").read_text()
    assert not {"PENDING", "RUNNING"} & set(jobs())
    stand = [row["status"] for row in rows()]
    assert stand == sorted(stand) and (stand[0], stand[-1]) == ("failed", "pending")
    os.remove("cloudpickle.py")
    assert sweeps.in_new_process(*args, "--limit=1").returncode == 0


def without(command: str, folder: Path) -> str:
    """A PATH on which a command is missing."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        if name != command:
            (folder / name).symlink_to("/bin/true")
    return str(folder)


def test_a_missing_command_or_package_is_told_before_anything_is_written(foreign, monkeypatch, capfd):
    args = [*FOREIGN, "--launcher=slurm", grid(model__lr=[0.1])]
    monkeypatch.setenv("PATH", without("squeue", foreign / "bin"))
    assert sweep.main(args) == 1
    assert capfd.readouterr().err == "error: launcher slurm needs SLURM's squeue, which is not on PATH\n"
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "slurm", raising=False)
    assert sweep.main(args) == 1
    assert capfd.readouterr().err == "error: launcher slurm needs submitit: pip install '.[cluster]'\n"
    assert not Path("logs").exists()


MISTAKES = {
    "partition": ("--slurm.partition=nix", "Invalid partition name specified"),
    "option": ("--slurm.options.qoss=x", "unrecognized option '--qoss=x'"),
    "setting": ("--slurm.partitoin=main", "unknown setting slurm.partitoin (did you mean slurm.partition?)"),
    "time": ("--slurm.time=0", "slurm.time: Not of type PositiveInt: 0 "),
}


@pytest.mark.parametrize("argument, told", MISTAKES.values(), ids=MISTAKES.keys())
def test_what_slurm_refuses_gets_a_line(cluster, foreign, capfd, argument, told):
    assert sweep.main([*FOREIGN, *SLURM, argument, grid(model__lr=[0.1, 0.2])]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0], lines
    assert not list(Path("logs").glob("sweeps/tiny/0*"))


def test_the_readmes_job_of_two_nodes_goes_on_when_it_is_requeued(cluster, folder, monkeypatch):
    readme = (REPO / "README.md").read_text()
    Path("nodes.yaml").write_text(re.search(r"```yaml\n(# nodes.yaml.*?)```", readme, re.DOTALL)[1])
    Path("mnist.sbatch").write_text(re.search(r"```bash\n(#!/bin/bash.*?)```", readme, re.DOTALL)[1])
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
    assert "Starting with 2 processes" in log.read_text() and "The run, with its" in log.read_text()
