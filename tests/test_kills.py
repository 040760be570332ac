"""kill -9 at random moments, of everything that a sweep consists of."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import REPO
from sweeps import QUIET, in_new_process, less_times, parts_of, rows, settings, start

KILLS = {"run": 44, "server": 3, "sweep": 3}  # the latter two cost seconds each, for all that is imported anew
GRID = {"model.net.l1_chan": [1, 2, 3, 4, 5, 6], "model.optimizer.nesterov": [False, True]}
TINY = QUIET | {"test_pictures": None, "num_threads": 1, "data.data_dir": str(REPO / "data"), "trainer.max_epochs": 1}
TINY |= {f"trainer.limit_{stage}_batches": 1 for stage in ("train", "val", "test")}
SWEEP = Path("logs/sweeps/tiny")
RESULTS = SWEEP / "results.csv"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="/proc is Linux's")
def test_fifty_kills_change_no_result(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = [*settings(folder, grid=GRID, fixed=TINY), "--max_failures=1000"]
    assert in_new_process(*args).returncode == 0
    SWEEP.rename("undisturbed")
    chance = random.Random(0)
    victims = chance.sample(list(KILLS), 50, counts=KILLS.values())
    process, began, end, printed = start(*args), time.time(), time.time() + 1800, ""
    while victims:
        assert time.time() < end, f"{len(victims)} are still to be killed"
        parts = parts_of(process)
        trains = RESULTS.exists() and RESULTS.stat().st_mtime > began  # before that, the configs are checked
        kinds = {"run": parts[1:] if trains else [], "server": parts[:1], "sweep": [process.pid]}
        if process.poll() is None and not kinds[victims[-1]]:
            time.sleep(0.01)
            continue
        time.sleep(chance.uniform(0, 1))
        if process.poll() is not None:
            if RESULTS.exists() and all(row["status"] == "finished" for row in rows()):
                for row in chance.sample(rows(), 9):  # too fast: they are to be done again
                    shutil.rmtree(SWEEP / row["name"])
            printed += process.communicate()[0]
            process, began = start(*args), time.time()
            continue
        for pid in kinds[victims[-1]][-1:]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
                victims.pop()
    process.kill()
    printed += process.communicate()[0]
    assert "Traceback" not in printed, printed
    done = in_new_process(*args)
    assert done.returncode == 0, done.stderr
    assert less_times(RESULTS) == less_times(Path("undisturbed/results.csv"))
    for run in SWEEP.glob("0*"):
        there, expected = (sorted(os.listdir(some)) for some in (run, Path("undisturbed", run.name)))
        assert there == expected
    assert not [path for path in (SWEEP / ".locks").iterdir() if path.is_dir()]
    strays = [path for folder in (SWEEP, SWEEP / "configs") for path in folder.glob(".*") if path.name != ".locks"]
    assert len(strays) <= KILLS["sweep"], strays  # a killed sweep's temporary file
