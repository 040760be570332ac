"""What the tests share: the command line in this process, on real MNIST limited to a few batches."""

import contextlib
import gzip
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
sys.argv = ["main.py"]  # LightningCLI warns where both sys.argv and args are given

from main import main  # noqa: E402

if not torch.cuda.is_available():
    # A first backward after torch.compile would start a thread for a GPU that is not there; then no fork could train.
    torch.ones(1, requires_grad=True).backward()

RESUME = "resume with: "  # what comes before the command that resumes a stopped run
DATA = REPO / "data"
BASE = ["--config", str(REPO / "configs/base.yaml"), f"--data.data_dir={DATA}"]
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=20",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=2",
    "--trainer.log_every_n_steps=5",
    "--histograms.every_n_steps=10",
    "--data.eval_batch_size=500",
]
SMALL = ["--model.net.l1_chan=4", "--model.net.l2_chan=8", "--model.net.l3_chan=16"]  # a third of the time of a step
FIT = ["fit", *BASE, *SMALL, *SHORT]
CONSTANT = "--model.lr_scheduler=null"  # the schedule depends on max_epochs; a resumed run could not have more
QUIET = ["--tensorboard=null", "--wandb=null"]  # no loggers
BRIEF = [*FIT, *QUIET, "--trainer.limit_train_batches=8", "--test_pictures=null", "--graph=null"]
RUNS = Path("logs/mnist")
RUN = RUNS / "version_0"
LAST = RUN / "checkpoints/last.ckpt"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "tests")}


@pytest.fixture(autouse=True, scope="session")
def no_account(tmp_path_factory):
    """No test uses a W&B account or the user's own settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for target in (os.environ, ONE_THREAD):
            patch.setitem(target, "HOME", str(home))
            patch.setitem(target, "NETRC", str(home / "netrc"))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, in which Python finds modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A finished run with everything on: its folder, the CLI object, what it printed."""
    folder = tmp_path_factory.mktemp("fitted")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        cli = main(FIT)
    run = folder / RUN
    return SimpleNamespace(
        folder=folder, run=run, config=f"--config={run}/config.yaml", cli=cli, out=out.getvalue(), err=err.getvalue()
    )


@pytest.fixture(autouse=True)
def signals():
    """A sweep in this process sets its own handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


@pytest.fixture
def foreign(folder):
    """A working directory with a program of its own."""
    shutil.copy(REPO / "tests/foreign.py", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A finished sweep of four points and three seeds with both loggers, as a user starts it, and what it printed."""
    import sweeps  # which imports this file

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"  # one for all workers
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "printed.txt").write_text(sweeps.run_tiny(folder))
    return folder, (folder / "printed.txt").read_text()


@pytest.fixture(scope="session")
def browser():
    """A real browser without a window."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver: Debian's packages are chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu enable-unsafe-swiftshader no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1400,900"]:
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@contextlib.contextmanager
def tensorboard(logdir: Path):
    """A real server; gives its address and a function that gets what a route serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", f"--port={url.rpartition(':')[2]}"]
    server = subprocess.Popen([*command, "--host=127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(route, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url}/data/{route}", data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=10))

    try:
        for _ in range(120):
            try:
                if get("runs"):
                    break
            except OSError:
                assert server.poll() is None, "TensorBoard ended"
            time.sleep(0.5)
        yield url, get
    finally:
        server.kill()
        server.wait()


def mnist(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 28, 28] and targets int64 [N] of train or t10k."""
    contents = []
    for kind, start in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(DATA / f"MNIST/raw/{part}-{kind}-ubyte.gz") as file:
            contents.append(torch.tensor(np.frombuffer(file.read(), np.uint8, offset=start)))
    return contents[0].view(-1, 28, 28), contents[1].long()


def metrics_of(run: Path) -> dict:
    """metrics.json without the duration, which no two runs share."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of fit."""
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = weights_of(run), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_run(run: Path, other: Path) -> None:
    """To the last digit."""
    assert metrics_of(run) == metrics_of(other)
    assert_same_weights(run, other)


def callback_of(cli, name: str):
    """The callback of a class, by its name."""
    (found,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == name]
    return found


def in_new_process(*args: str) -> subprocess.CompletedProcess:
    """`python main.py ARGS` in the working directory."""
    command = [sys.executable, str(REPO / "main.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return done


def start(program: str, *args: str, **options) -> subprocess.Popen:
    """`python PROGRAM ARGS` in the working directory, to be stopped or waited for."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(REPO / program), *args], start_new_session=True, **streams | options)


def wait_for(condition, of: subprocess.Popen | Path | None = None, seconds: float = 180):
    """Waits until it holds; gives what it is. If it never does, or the process ends, its output or log is shown."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if isinstance(of, subprocess.Popen) and of.poll() is not None:
            pytest.fail(f"it has ended: {of.communicate(timeout=5)}")
        if time.monotonic() > end:
            pytest.fail(f"waited for {seconds} s: {of.read_text() if isinstance(of, Path) and of.exists() else of}")
        time.sleep(0.05)
    return found


def resume(line: str, *more: str) -> Path:
    """Runs the command that an error recommends; returns the new run."""
    command = shlex.split(line.partition(RESUME)[2])
    assert command[:2] == ["python", "main.py"], line
    main([*command[2:], *more])
    return max(RUNS.iterdir())


def error_of(capfd, *args: str) -> str:
    """The one line on standard error with which a bad command line ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code not in (0, None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def printed_config(capfd, *args: str) -> str:
    """What --print_config prints."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*args, "--print_config"])
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err
    return printed.out
