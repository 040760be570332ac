"""Sweeps in processes of their own: killed, stopped, two at once, on a terminal."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import REPO, wait_for
from sweeps import (
    FOREIGN,
    QUIET,
    SWEEP,
    children,
    grid,
    in_new_process,
    less_times,
    rows,
    settings,
    start,
    statuses,
    trained,
)

from mnist_cnn.sweeps.ledger import lock, read_run

KILLS = {"run": 20, "sweep": 5}
GRID = {"model.net.l1_chan": [1, 2, 3, 4, 5, 6], "model.optimizer.nesterov": [False, True]}
TINY = QUIET | {"test_pictures": None, "num_threads": 1, "data.data_dir": str(REPO / "data"), "trainer.max_epochs": 1}
TINY |= {f"trainer.limit_{stage}_batches": 1 for stage in ("train", "val", "test")}
RESULTS = SWEEP / "results.csv"

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="/proc is Linux's")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_random_kills_change_no_result(folder):
    args = [*settings(folder, grid=GRID, fixed=TINY), "--max_failures=1000"]
    assert in_new_process(*args).returncode == 0
    SWEEP.rename("undisturbed")
    chance = random.Random(0)
    victims = chance.sample(list(KILLS), sum(KILLS.values()), counts=KILLS.values())
    args += ["--jobs=2"]
    process, end, printed = start(*args), time.time() + 600, ""
    while victims:
        assert time.time() < end, f"{len(victims)} are still to be killed"
        targets = {"run": children(process), "sweep": [process.pid]}[victims[-1]]
        if process.poll() is None and not targets:
            time.sleep(0.01)
            continue
        time.sleep(chance.uniform(0, 1))
        if process.poll() is not None:
            if RESULTS.exists() and set(statuses()) == {"finished"}:
                for row in chance.sample(rows(), 9):  # faster than the kills: execute some again
                    shutil.rmtree(SWEEP / row["name"])
            printed += process.communicate()[0]
            process = start(*args)
            continue
        with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended
            os.kill(targets[-1], signal.SIGKILL)
            victims.pop()
    process.kill()
    printed += process.communicate()[0]
    assert "Traceback" not in printed, printed
    done = in_new_process(*args)
    assert done.returncode == 0, done.stderr
    assert less_times(RESULTS) == less_times(Path("undisturbed/results.csv"))
    for run in SWEEP.glob("0*"):
        assert sorted(os.listdir(run)) == sorted(os.listdir(Path("undisturbed", run.name)))


def test_a_run_dies_with_its_sweep_and_starts_over(foreign):
    args = [*FOREIGN, grid(model__fault=["wait"])]
    process = start(*args)
    wait_for(trained, process)
    assert read_run(SWEEP, "000-fault=wait", "loss").status == "running"
    process.kill()
    process.wait()
    lock(SWEEP, "000-fault=wait", timeout=10)  # held until the run's process has died
    assert read_run(SWEEP, "000-fault=wait", "loss").status == "pending"
    process = start(*args)
    wait_for(lambda: len(trained()) == 2, process)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_killed_search_finds_what_it_finds_undisturbed(foreign):
    axes = grid(model__lr={"low": 0.01, "high": 0.5, "log": True}, model__bias=[False, True])
    args = [*FOREIGN, "--search=tpe", "--sample=14", "--fixed.seed_everything=1", axes]  # TPE begins after ten
    assert in_new_process(*args).returncode == 0
    SWEEP.rename("undisturbed")
    os.remove("trained.txt")
    for count in (2, 5, 13):
        process = start(*args)
        wait_for(lambda: len(trained()) >= count, process)  # noqa: B023
        process.kill()
        process.wait()
    assert in_new_process(*args).returncode == 0
    assert less_times(RESULTS) == less_times(Path("undisturbed/results.csv"))


@pytest.mark.parametrize("jobs, ended", {1: ["interrupted", "pending"], 2: ["interrupted"] * 2}.items())
def test_ctrl_c_in_a_terminal_ends_the_runs_cleanly(jobs, ended, foreign):
    process = start(*FOREIGN, "--fixed.model.fault=pause", grid(model__lr=[0.1, 0.2]), f"--jobs={jobs}")
    wait_for(lambda: len(trained()) == jobs, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in printed
    assert printed.splitlines()[-1] == "stopped: the same command continues from here"
    assert statuses() == ended
    for log in SWEEP.glob("*/output.log"):
        assert "attempting graceful shutdown" in log.read_text()


def test_two_sweeps_share_the_work(foreign):
    args = [*FOREIGN, "--fixed.model.fault=pause", grid(model__lr=[0.1, 0.2, 0.3, 0.4])]
    one, other = start(*args), start(*args)
    printed = [process.communicate(timeout=300)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), printed
    assert statuses() == ["finished"] * 4
    assert len(trained()) == 4
    shares = [re.findall(r"^\[.*?\] +(\d+)-", text, flags=re.MULTILINE) for text in printed]
    assert all(shares) and sorted(shares[0] + shares[1]) == ["000", "001", "002", "003"]


def test_a_terminal_shows_the_whole_sweep_while_it_runs(foreign):
    pty = pytest.importorskip("pty")
    terminal, theirs = pty.openpty()
    size = {"COLUMNS": "120", "LINES": "30", "TERM": "xterm-256color"}
    args = [*FOREIGN, grid(model__fault=[None, "exit", "pause"])]
    process = start(*args, stdout=theirs, stderr=theirs, env=os.environ | size)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(terminal, 10_000):
            shown += part
    os.close(terminal)
    assert process.wait() == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert "\u2501" in text  # the bar
    state = r"\u2501 +\[2/3\]  best 0\.\d{4} \(000\)  0:00:\d\d left  1 failed\n002  \S"
    assert re.search(state, "\n".join(lines))
    lines = [line for line in lines if line]
    assert lines[-2].startswith("2 of 3 runs are finished") and lines[-1].startswith("report: ")


LOOKS = """
import os
import main as program

def main(args):
    if "--print_config" not in args:
        parent = f"/proc/{os.getppid()}"
        files = [os.readlink(f"{parent}/fd/{file}") for file in os.listdir(f"{parent}/fd")]
        print("THREADS", len(os.listdir(f"{parent}/task")), [file for file in files if "nvidia" in file])
    return program.main(args)
"""


def test_the_process_that_forks_the_runs_has_one_thread_and_no_device(folder):
    Path("looks.py").write_text(LOOKS)
    done = in_new_process(*settings(folder, grid={"model.optimizer.lr": [0.1]}, program="looks:main"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "THREADS 1 []" in (SWEEP / "000-lr=0.1/output.log").read_text()
