"""What the tests share: the command line in this process, on real MNIST limited to a few batches."""

import contextlib
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

import pytest
import torch
from selenium import webdriver

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
sys.argv = ["main.py"]  # LightningCLI warns where both sys.argv and args are given

from main import main  # noqa: E402

BASE = ["--config", str(REPO / "configs/base.yaml"), f"--data.data_dir={REPO / 'data'}"]
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=20",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=2",
    "--trainer.log_every_n_steps=5",
    "--histograms.every_n_steps=10",
    "--data.eval_batch_size=500",
]
FIT = ["fit", *BASE, *SHORT]
QUIET = ["--tensorboard=null", "--wandb=null"]  # no loggers


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    """No W&B account and no setting of the machine's plays a part."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    """A finished sweep of four runs with both loggers, as a user starts it."""
    import sweeps  # which imports this file

    folder = tmp_path_factory.mktemp("tiny")
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SHORT])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment["HOME"] = str(folder)
    done = sweeps.in_new_process(
        *sweeps.settings(folder, fixed=fixed), cwd=folder, env=environment | {"HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="session")
def browser():
    """A real browser without a window."""
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


def metrics_of(run: Path) -> dict:
    """metrics.json less what no two runs share."""
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


def in_new_process(*args: str) -> subprocess.CompletedProcess:
    """`python main.py ARGS` in the working directory."""
    command = [sys.executable, str(REPO / "main.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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


def go_on(line: str, *more: str) -> Path:
    """Does what an error says; returns the new run."""
    command = shlex.split(line.partition("to go on: ")[2])
    assert command[:2] == ["python", "main.py"]
    main([*command[2:], *more])
    return max(Path("logs/mnist").iterdir())


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
