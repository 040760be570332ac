"""No secret reaches a file: a planted key is searched for in everything that a run and a sweep write."""

import base64
import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sweeps
from conftest import BASE, FIT, REPO, SHORT
from test_wandb_hosts import HOSTS, serving

KEY = "5ec2e7" + "0123456789abcdef" * 2 + "ab"  # 40 hexadecimal digits, as W&B's keys used to be
TOKEN = "token-of-the-git-remote"


def hiding(secret: str) -> set[bytes]:
    """What a secret looks like in a file: as it is, in UTF-16, backwards, in base64 at each offset, in hexadecimal."""
    plain = secret.encode()
    shifted = [base64.b64encode(b"\0" * shift + plain)[4 if shift else 0 : -4] for shift in range(3)]
    return {plain, plain[::-1], secret.encode("utf-16-le"), plain.hex().encode(), *shifted}


def contents(path: Path):
    """The bytes of a file, and of what is packed into it."""
    content = path.read_bytes()
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())


def leaks(folder: Path, *secrets: str) -> list[str]:
    looks = {look for secret in secrets for look in hiding(secret)}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5
    found = [str(path) for path in files for content in contents(path) for look in looks if look in content]
    names = [str(path) for path in folder.rglob("*") for secret in secrets if secret in path.name]
    return found + names


def start(folder: Path, url: str, *command: str, **more: str) -> subprocess.CompletedProcess:
    """Runs a command in a git repository whose remote has a token, with a key for W&B."""
    remote = f"https://user:{TOKEN}@example.org/a/b.git"
    for git in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *git], cwd=folder, check=True)
    (folder / ".git/config").rename(folder.parent / "git-config")
    (folder / ".git/config").symlink_to(folder.parent / "git-config")  # where it may be
    own = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    own |= {"HOME": str(folder), "WANDB_BASE_URL": url, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temp")} | more
    (folder / "temp").mkdir()
    done = subprocess.run([sys.executable, *command], cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout + done.stderr)
    return done


@pytest.mark.parametrize("hidden", [lambda s: s, lambda s: base64.b64encode(b"x" + s.encode() + b"y").decode()])
def test_the_search_finds_what_is_there(tmp_path, hidden):
    for index in range(6):
        (tmp_path / str(index)).write_text("nothing")
    assert leaks(tmp_path, KEY) == []
    with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", f"key={hidden(KEY)}")
    assert leaks(tmp_path, KEY) == [str(tmp_path / "packed.ckpt")]


@pytest.mark.parametrize("host", ["refuses", "answers once and hangs"])
def test_a_fit_writes_no_secret(tmp_path, host):
    folder = tmp_path / "work"
    folder.mkdir()
    with serving(HOSTS[host]) as url:
        start(folder, url, str(REPO / "main.py"), *FIT, "--num_threads=1", WANDB_API_KEY=KEY)
    assert list(folder.glob("logs/wandb/offline-run-*/*.wandb")) and list(folder.glob("logs/mnist/*/events.*"))
    assert leaks(folder, KEY, TOKEN) == []
    assert leaks(folder, "example.org/a/b.git")  # so the remote was looked at


def test_a_sweep_writes_no_secret(tmp_path):
    """The key is in .netrc, as wandb login puts it there."""
    folder = tmp_path / "work"
    folder.mkdir()
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SHORT, "--num_threads=1"])
    command = [str(REPO / "sweep.py"), *sweeps.settings(folder, fixed=fixed, grid={"model.net.l1_chan": [4, 8]})]
    with serving(HOSTS["refuses"]) as url:
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine {url.removeprefix('http://')}\n login user\n password {KEY}\n")
        netrc.chmod(0o600)
        start(folder, url, *command, NETRC=str(netrc))
    outputs = [path.read_text() for path in folder.glob("logs/sweeps/tiny/*/output.log")]
    assert len(outputs) == 2 and all("can't be reached" in output for output in outputs)  # so the key was found
    assert leaks(folder, KEY, TOKEN) == []
