"""The commands of sweep.py in the README and the pages of docs/, whose grids are checked, and the grid of 64."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from sweeps import in_new_process
from test_readme import clone, starting  # noqa: F401  a fixture

import sweep


@pytest.mark.parametrize("command", starting("python sweep.py"))
def test_commands_of_sweep_are_understood(clone, command):  # noqa: F811
    (clone / "my_configs").mkdir()
    for name in ("fast", "best"):
        shutil.copy(REPO / f"configs/{name}.yaml", "my_configs")
    options = [option for option in shlex.split(command) if option not in ("--dry_run", "--launcher=slurm")]
    assert sweep.main([*options, "--dry_run", "--limit=2"]) == 0


def test_a_new_process_checks_the_grid_of_64_and_keeps_whole_numbers_whole(folder):
    # 1 batch and 1.0, all of them, differ; which of them the parser makes once depended on what had been imported.
    shutil.copytree(REPO / "configs", "configs")
    done = in_new_process("--dry_run", "--fixed.trainer.limit_train_batches=1", "--fixed.trainer.limit_val_batches=1.0")
    assert done.returncode == 0, done.stderr
    names = sorted(os.listdir("logs/sweeps/mnist/configs"))
    assert len(names) == 64
    assert names[17] == "017-l1_chan=4-l2_chan=16-l3_chan=16-lr=0.02-momentum=0.8-nesterov=true.yaml"
    for name in names:
        trainer = yaml.safe_load(Path("logs/sweeps/mnist/configs", name).read_text())["trainer"]
        assert [repr(trainer[f"limit_{stage}_batches"]) for stage in ("train", "val")] == ["1", "1.0"]
