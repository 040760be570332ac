"""Two fits that begin at the same moment and share a folder."""

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import BASE, REPO, SHORT, error_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mnist_cnn.cli import new_version

# Each waits until the other has imported all, too.
SCRIPT = """
import contextlib, io, json, os, sys, time
rounds, repo = json.loads(sys.argv[1]), sys.argv[2]
sys.path.insert(0, repo)
sys.argv = ["main.py"]
from main import main
ended = []
for number, args in enumerate(rounds):
    open(f"ready{number}.{os.getpid()}", "w").close()
    while len([name for name in os.listdir() if name.startswith(f"ready{number}.")]) < 2:
        time.sleep(0.001)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(args)
            status = 0
        except SystemExit as end:
            status = end.code
    ended.append([status, errors.getvalue()])
print("ended", json.dumps(ended))
"""


def side_by_side(rounds: list[list[str]]) -> list[list[tuple[int, str]]]:
    """The lower exit status with its errors and the other one, for each command line."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(rounds), str(REPO)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    ended = [json.loads(text.rpartition("ended ")[2]) for text in printed]
    return [sorted(map(tuple, pair)) for pair in zip(*ended)]


FIT = ["fit", *BASE, *SHORT, "--num_threads=1", "--trainer.max_epochs=1"]


def is_whole(run: Path, seed: int | None = None) -> None:
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1 and (seed is None or config["seed_everything"] == seed)
    assert len(list(run.glob("checkpoints/*.ckpt"))) == 2 and len(list(run.glob("events.*"))) == 1


def test_the_same_logs_folder_gets_two_runs(folder):
    (both,) = side_by_side([FIT])
    assert [code for code, *_ in both] == [0, 0], both
    assert sorted(path.name for path in Path("logs/mnist").iterdir()) == ["version_0", "version_1"]
    for version in ("version_0", "version_1"):
        is_whole(Path("logs/mnist", version))
    offline = list(Path("logs/wandb").glob("offline-run-*"))
    assert len(offline) == 2
    for run in offline:
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(run)]
        assert '"exit_code":0' in subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.replace(
            " ", ""
        )


def test_the_same_run_folder_goes_to_one_of_them(folder):
    """The other one says so, and takes nothing from the first, made anew or found, resumed or failing."""
    os.mkdir("found")
    Path("found/notes.txt").write_text("mine")
    folders = ["run", "found", "logs/deep/er"]
    for both in side_by_side([[*FIT, "--wandb=null", f"--run_dir={name}"] for name in folders]):
        (won, _), (lost, errors) = both
        assert won == 0 and lost == 1, both
        line = errors.splitlines()[-1]  # behind Lightning's advice, where there is Slurm
        assert line.startswith("error: ") and line.endswith("holds a run already: give the run another folder")
    for name in folders:
        is_whole(Path(name))
    assert Path("found/notes.txt").read_text() == "mine"


def test_a_loggers_folder_goes_to_one_of_them(folder):
    csv = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=7"]
    (both,) = side_by_side([[*FIT, *csv]])
    (won, _), (lost, errors) = both
    assert won == 0 and lost == 1, both
    assert "logs/lightning_logs/version_7 holds a run already" in errors
    run = Path("logs/lightning_logs/version_7")
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1 and (run / "config.yaml").read_text()


def test_a_folder_that_was_found_is_left_as_it_was(folder, capfd):
    """By a run that fails before its first step."""
    os.mkdir("found")
    Path("found/notes.txt").write_text("mine")
    error_of(capfd, *FIT, "--run_dir=found", "--data.val_size=70000")
    assert sorted(str(path) for path in folder.rglob("*")) == [str(folder / "found"), str(folder / "found/notes.txt")]


def test_a_run_beside_it_is_left_as_it_was(folder, capfd, monkeypatch):
    """One that began in the same folder meanwhile."""

    def begin_beside(*_, **__):
        os.makedirs("logs/mnist/version_1")
        raise MisconfigurationException("this fault was asked for")

    monkeypatch.setattr("mnist_cnn.data.MNISTDataModule.setup", begin_beside)
    assert "this fault was asked for" in error_of(capfd, *FIT, "--run_dir=logs/mnist")
    assert sorted(map(str, Path().rglob("*"))) == ["logs", "logs/mnist", "logs/mnist/version_1"]


def test_many_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_version(tmp_path / "logs"), range(40)))
    assert sorted(made) == sorted(tmp_path / "logs" / f"version_{n}" for n in range(40))


def test_a_folder_that_another_removes_as_empty_is_made_again(tmp_path):
    """As a failing run does, while the next one begins."""
    root, removed, done = tmp_path / "logs", [], False

    def remove():
        while not done:
            with contextlib.suppress(OSError):
                root.rmdir()
                removed.append(root)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(remove)
        try:
            for _ in range(200):
                new_version(root).rmdir()
        finally:
            done = True
    assert len(removed) > 20


def test_a_link_that_leads_nowhere_and_a_file_are_told(folder, capfd):
    os.symlink("nowhere", "logs")
    assert error_of(capfd, *FIT) == "error: logs/mnist can't be written: File exists"
    assert error_of(capfd, *FIT, "--run_dir=logs/mine") == "error: logs/mine can't be written: File exists"
    os.remove("logs")
    Path("logs").touch()
    assert error_of(capfd, *FIT) == "error: logs/mnist can't be written: Not a directory"
    os.remove("logs")
    os.mkdir("logs")
    Path("logs/mnist").touch()
    assert error_of(capfd, *FIT) == "error: logs/mnist can't be written: File exists"
    assert [str(path) for path in Path().rglob("*")] == ["logs", "logs/mnist"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
