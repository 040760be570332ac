"""W&B's server out of order in each way there is: the fit ends well, tells it in one line, and keeps what W&B needs."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import wandb
from conftest import FIT, error_of, in_new_process, main, metrics_of, start, wait_for

from mnist_cnn import cli

KEY = "0" * 40
FEW = [*FIT, "--tensorboard=null", "--trainer.max_epochs=1"]
SECONDS = 3 + 5 + 4  # that a host may cost at the start: to be reached, to take the run, and for W&B offline instead


def hang(connection):
    """Never answers."""
    while connection.recv(65536):
        pass


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def babble(connection):
    connection.sendall(b"\x00garbage\r\n\r\n")


def drip(connection):
    """A header that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Wait: a second\r\n")
        time.sleep(1)


def answer(status, body=b"", more=""):
    def speak(connection):
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
        connection.recv(65536)
        connection.sendall(head.encode() + body)

    return speak


def first_well(connection):
    """Answers HEAD and hangs on the rest."""
    method = connection.recv(65536)
    if method.startswith(b"HEAD"):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    else:
        hang(connection)


HOSTS = {
    "refuses": None,
    "resets": reset,
    "never answers": hang,
    "sends garbage": babble,
    "drips": drip,
    "sends a page": answer("200 OK", b"<html><title>Log in to the Wi-Fi</title></html>"),
    "has an error": answer("500 Internal Server Error"),
    "knows no such key": answer("401 Unauthorized", b'{"errors": [{"message": "invalid key"}]}'),
    "sends you round in circles": answer("302 Found", more="Location: /again\r\n"),
    "answers once and hangs": first_well,
}


@contextlib.contextmanager
def serving(speak):
    """The address of a server that speaks as it is told with each connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if speak is None:
            listener.close()
        else:
            listener.listen(50)

        def converse(connection):
            with connection, contextlib.suppress(OSError):
                speak(connection)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=converse, args=listener.accept()[:1], daemon=True).start()

        if speak:
            threading.Thread(target=serve, daemon=True).start()
        yield url


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch):
    """W&B reads its environment once in a process."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield
    wandb.teardown()


def stopwatch(monkeypatch, name):
    """Measures how long the CLI waits for a function."""
    times, function = [], getattr(cli, name)

    def timed(*args, **kwargs):
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.monotonic() - began)

    monkeypatch.setattr(cli, name, timed)
    return times


def offline_run(folder):
    """The one offline run, as W&B's own reader gives its summary."""
    (run,) = folder.glob("logs/wandb/*run-*")
    assert run.name.startswith("offline-run-")
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(run)]
    return json.loads(subprocess.run(read, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_out_of_order_costs_seconds_and_a_line(host, folder, monkeypatch, capfd):
    clock = stopwatch(monkeypatch, "start_wandb")
    with serving(HOSTS[host]) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        main(FEW)
    output = capfd.readouterr()
    told = [line for line in output.err.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("W&B: ") and told[0].endswith("so the run is offline"), told
    assert "wandb sync logs/wandb/offline-run-" in output.out
    assert offline_run(folder)["summary"]["val/acc"] == metrics_of(folder / "logs/mnist/version_0")["val/acc"]
    assert clock[0] < SECONDS


def test_a_password_in_the_hosts_address_is_not_told(folder, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:pass-word@127.0.0.1:9")
    main(FEW)
    (told,) = capfd.readouterr().err.splitlines()
    assert told == "W&B: http://127.0.0.1:9 can't be reached, so the run is offline"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="/proc is Linux's")
def test_wandbs_process_may_be_killed(folder):
    """What was logged until then is on the disk; the run tells of it in a line."""
    own = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    settings = ["--num_threads=1", "--trainer.max_epochs=1000", "--early_stopping=null"]
    process = start("main.py", *FEW, *settings, env=own)
    wait_for(Path("logs/mnist/version_0/checkpoints/last.ckpt").exists, process)
    killed = subprocess.run(["pkill", "-KILL", "--parent", str(process.pid), "wandb-core"])
    assert killed.returncode == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [errors.splitlines()[0]], errors
    assert torch.load("logs/mnist/version_0/checkpoints/last.ckpt", weights_only=True)["epoch"] >= 0


def test_a_process_ends_in_time_though_the_host_hangs(folder, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # which the run that W&B gives up would keep in use
    with serving(HOSTS["answers once and hangs"]) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        done = in_new_process(*FEW, "--num_threads=1")
    assert done.stderr.count("W&B: ") == done.stderr.count("so the run is offline") == 1
    assert offline_run(folder)["exit_code"] == 0
    assert list(folder.glob("logs/wandb/offline-run-*-mine"))


@pytest.mark.parametrize("mode", ["online", None])
def test_a_key_that_is_none_of_wandbs_is_told(folder, monkeypatch, capfd, mode):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    main(FEW)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("W&B: ") and told[0].endswith("so the run is offline"), told
    assert len(list(folder.glob("logs/wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_mode_wins(folder, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    main(FEW)
    assert len(list(folder.glob("logs/wandb/offline-run-*"))) == (mode == "offline")


def test_unknown_wandb_mode(folder, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "foo")
    assert "WANDB_MODE=foo" in error_of(capfd, *FIT)
    assert list(folder.iterdir()) == []
