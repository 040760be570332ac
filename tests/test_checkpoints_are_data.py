"""A file that somebody else gave is data: nothing in it is executed, unless the user says so."""

import functools
import http.server
import json
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, FIT, QUIET, error_of, main

import report
import sweep

PAYLOADS = ["state_dict", "hyper_parameters", "callbacks", "optimizer_states", "a key of its own"]
FORMATS = ["zip", "legacy", "pickle", "tar"]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run's folder."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, *QUIET])
    return folder / "logs/mnist/version_0"


@pytest.fixture
def sprung(tmp_path):
    """The file that is there if something was executed."""
    return tmp_path / "sprung"


def malicious(good: Path, path: Path, sprung: Path, payload: str, form: str = "zip") -> None:
    """Writes a checkpoint that is good but for one thing in it."""
    content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
    trap = Trap(sprung)
    if isinstance(content.get(payload), dict):
        content[payload]["trap"] = trap
    elif isinstance(content.get(payload), list):
        content[payload].append(trap)
    else:
        content[payload] = trap
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "tar":  # the format before PyTorch 0.1.10
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                (path.parent / name).write_bytes(pickle.dumps(content))
                archive.add(path.parent / name, name)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_trap_in_a_checkpoint_is_not_sprung(good, folder, sprung, capfd, payload, form):
    malicious(good, folder / "odd.ckpt", sprung, payload, form)
    for stage in ("fit", "test") if form == "zip" else ("test",):
        line = error_of(capfd, stage, *BASE, *QUIET, "--ckpt_path=odd.ckpt")
        assert "checkpoint odd.ckpt" in line and "--weights_only=false" in line
    assert not sprung.exists() and not (folder / "logs").exists()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("which", ["best", "last", None])
def test_a_trap_in_a_runs_folder_is_not_sprung(good, folder, sprung, capfd, stage, which):
    run = folder / "logs/mnist/version_0"
    shutil.copytree(good, run)
    named = (
        "checkpoints/last.ckpt"
        if which == "last"
        else json.loads((run / "metrics.json").read_text())["best_checkpoint"]
    )
    malicious(good, run / named, sprung, "state_dict")
    line = error_of(capfd, stage, *BASE, *QUIET, *[f"--ckpt_path={which}"] * bool(which))
    assert f"checkpoint {run.relative_to(folder) / named}" in line
    assert not sprung.exists()


def test_the_user_may_say_so(good, folder, sprung):
    malicious(good, folder / "odd.ckpt", sprung, "a key of its own")
    main(["test", *BASE, *QUIET, "--ckpt_path=odd.ckpt", "--weights_only=false", "--trainer.limit_test_batches=1"])
    assert sprung.exists()


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_trap_behind_an_address_is_not_sprung(good, folder, sprung, capfd, monkeypatch, stage):
    """Lightning fetches it, and by itself would unpickle anything from there."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    malicious(good, folder / "odd.ckpt", sprung, "callbacks")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/odd.ckpt"
        with pytest.raises(SystemExit):
            main([stage, *BASE, *QUIET, f"--ckpt_path={url}"])
        server.shutdown()
    *download, line = capfd.readouterr().err.splitlines()
    assert "100%" in "".join(download) and line.startswith("error: UnpicklingError: Weights only load failed")
    assert not sprung.exists()


def test_no_variable_of_the_environment_says_it_for_the_user(good, folder, sprung, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    malicious(good, folder / "odd.ckpt", sprung, "state_dict")
    error_of(capfd, "test", *BASE, *QUIET, "--ckpt_path=odd.ckpt")
    assert not sprung.exists()


def test_a_trap_in_what_submitit_keeps_is_not_sprung(tmp_path, sprung):
    """A sweep's folder may be somebody else's; its jobs are looked for there."""
    slurm = pytest.importorskip("slurm", reason="no submitit: pip install '.[cluster]'")
    work = functools.partial(slurm.run, tmp_path, "val/acc", {"program": "main:main", "takes_run_dir": True})
    file = tmp_path / "1_0_submitted.pkl"
    slurm.submitit.core.utils.DelayedSubmission(work, "000-a=1", Trap(sprung)).dump(file)
    assert slurm.run_of(file) == "000-a=1" and not sprung.exists()
    pickle.loads(file.read_bytes())
    assert sprung.exists()  # so it could have been


TAG = "!!python/object/apply:os.mkdir [executed]"


def test_a_tag_in_a_yaml_file_is_not_executed(good, folder, capfd):
    """Wherever YAML is read: a config, a grid, a folder of configs, a sweep's folder."""
    Path("odd.yaml").write_text(f"seed_everything: {TAG}")
    assert "odd.yaml is not valid YAML" in error_of(capfd, *FIT, "--config=odd.yaml")
    root = folder / "logs/sweeps/odd"
    shutil.copytree(good, root / "run")
    for name in ("configs/run.yaml", "sweep.yaml", "run/config.yaml"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"seed_everything: {TAG}")
    Path("mine").mkdir()
    shutil.copy("odd.yaml", "mine")
    for args in (
        ["--config=odd.yaml"],
        ["--run_dir=mine"],
        ["--name=odd", "--grid={a: [1]}"],
        [f"--run_dir={root}/configs"],
    ):
        assert sweep.main([*args, "--dry_run"]) == 1
    assert sweep.status(root, "run", "val/acc")[0] == "damaged"
    report.report(root)
    assert not Path("executed").exists()
    yaml.unsafe_load(TAG)
    assert Path("executed").exists()  # so it could have been
