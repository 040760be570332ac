"""Odd but legal environments: in each a fit, and in some a sweep, gives to the last digit what it gives elsewhere."""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import BASE, QUIET, REPO, SHORT, main, metrics_of

LIMITS = [*SHORT, "--trainer.max_epochs=1", "--num_threads=1"]
ELSEWHERE = "one's own folder, ü 日本 $HOME #1"
C = {"LANG": "C", "LC_ALL": "C"}  # in which Python takes UTF-8, unless it is told not to
# Importing torch and Lightning warns by itself, so only what this project's files are warned of.
OURS = ",".join(f"error:::mnist_cnn.{file.stem}" for file in (REPO / "mnist_cnn").glob("*.py")) + ",error:::__main__"
# What a shell does with the command, and the variables it has.
ODD: dict[str, tuple[str, dict[str, str]]] = {
    "LANG=C": ('exec "$@"', C),
    "no UTF-8": ('exec "$@"', C | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "umask 077": ('umask 077; exec "$@"', {}),
    "no HOME": ('unset HOME USER LOGNAME; exec "$@"', {}),
    "HOME is nowhere": ('exec "$@"', {"HOME": "/nowhere/at all"}),
    "one CPU": ('exec taskset --cpu-list 0 "$@"', {}),
    "warnings are errors": ('exec "$@"', {"PYTHONWARNINGS": OURS}),
    "stdout closed": ('exec "$@" >&-', {}),
    "stdin closed": ('exec "$@" <&-', {}),
    "everything closed": ('exec "$@" <&- >&- 2>&-', {}),
    "nobody reads": ('set -o pipefail; "$@" | true', {}),
    "no docstrings": ('exec "$@"', {"PYTHONOPTIMIZE": "2"}),
    "TMPDIR is relative": ('mkdir "my temp"; exec "$@"', {"TMPDIR": "my temp"}),
    "odd terminal and clock": (
        'exec "$@"',
        {
            "COLUMNS": "1",
            "LINES": "1",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "TZ": "Pacific/Kiritimati",
            "PYTHONHASHSEED": "1",
        },
    ),
}
SWEPT = ["no UTF-8", "no HOME", "everything closed", "nobody reads", "no docstrings"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """metrics.json of an ordinary environment, by number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("expected"))
        fits = [["fit", *BASE, *LIMITS, f"--num_threads={threads}", *QUIET] for threads in (1, 2)]
        return {1 + index: metrics_of(main(fit).run_dir) for index, fit in enumerate(fits)}


def start(folder: Path, environment: str, *command: str) -> subprocess.CompletedProcess:
    shell, variables = ODD.get(environment, ('exec "$@"', {}))
    own = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTHON"))}
    own |= {"HOME": str(folder), "OMP_NUM_THREADS": "1"} | variables
    own.pop("NETRC", None)
    command = ("bash", "-c", shell, "bash", sys.executable, *command)
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, encoding="utf-8", timeout=400)


def sweep_of_one(folder: Path, clone: Path = REPO) -> list[str]:
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *LIMITS])
    content = {
        "name": "odd",
        "base": str(clone / "configs/base.yaml"),
        "grid": {"seed_everything": [138]},
        "fixed": fixed,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return [str(clone / "sweep.py"), "--config=grid.yaml"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The processes, two at a time since each has one thread, with their folders."""
    root = tmp_path_factory.mktemp("environments")
    found: dict[tuple[str, str], tuple[Path, Future]] = {}
    with ThreadPoolExecutor(2) as pool:
        for index, (kind, name) in enumerate([*(("fit", name) for name in ODD), *(("sweep", name) for name in SWEPT)]):
            folder = root / str(index)
            folder.mkdir()
            fit = [str(REPO / "main.py"), "fit", *BASE, *LIMITS, *["--num_threads=2"] * (name == "one CPU")]
            command = fit if kind == "fit" else sweep_of_one(folder)
            found[kind, name] = folder, pool.submit(start, folder, name, *command)
        yield found


def check(done: subprocess.CompletedProcess, folder: Path, name: str, expected: dict) -> None:
    run = folder / name
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert metrics_of(run) == expected
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["seed_everything"] == 138
    assert list(run.glob("events.*")) and list(folder.glob("logs/wandb/*/*.wandb"))


@pytest.mark.parametrize("environment", ODD)
def test_a_fit_is_the_same_in_any_environment(started, expected, environment):
    folder, done = started["fit", environment]
    check(done.result(), folder, "logs/mnist/version_0", expected[2 if environment == "one CPU" else 1])
    if environment == "umask 077":
        assert not any(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) for path in folder.glob("logs/**/*"))


@pytest.mark.parametrize("environment", SWEPT)
def test_a_sweep_is_the_same_in_any_environment(started, expected, environment):
    folder, done = started["sweep", environment]
    check(done.result(), folder, "logs/sweeps/odd/000-seed_everything=138", expected[1])


def test_a_clone_may_lie_anywhere(tmp_path, expected):
    """Clone, working directory and logs have odd names; data_dir is relative to the working directory."""
    clone, folder = tmp_path / ELSEWHERE / "clone", tmp_path / ELSEWHERE / "work"
    folder.mkdir(parents=True)
    shutil.copytree(REPO, clone, ignore=shutil.ignore_patterns(".*", "data", "tests", "assets", "logs", "benchmarks"))
    (folder / "the data").symlink_to(REPO / "data")
    config = f"--config={clone / 'configs/base.yaml'}"
    data = ["--data.data_dir=the data", "--trainer.default_root_dir=lögs/a b"]
    done = start(folder, "LANG=C", str(clone / "main.py"), "fit", config, *LIMITS, *data)
    check(done, folder, "lögs/a b/version_0", expected[1])
    again = f"--config={folder / 'lögs/a b/version_0/config.yaml'}"
    tested = start(folder, "", str(clone / "main.py"), "test", again)
    assert tested.returncode == 0 and f"{expected[1]['test/loss']:.6f}"[:7] in tested.stdout, tested
    done = start(folder, "", *sweep_of_one(folder, clone))
    check(done, folder, "logs/sweeps/odd/000-seed_everything=138", expected[1])
