"""The commands of sweep.py in the README and the pages of docs/: 20 seconds, since each is checked with its grid."""

import shlex
import shutil

import pytest
from conftest import REPO
from test_readme import clone, starting  # noqa: F401  a fixture

import sweep


@pytest.mark.parametrize("command", starting("python sweep.py"))
def test_commands_of_sweep_are_understood(clone, command):  # noqa: F811
    (clone / "my_configs").mkdir()
    for name in ("fast", "best"):
        shutil.copy(REPO / f"configs/{name}.yaml", "my_configs")
    options = [option for option in shlex.split(command) if option not in ("--dry_run", "--launcher=slurm")]
    assert sweep.main([*options, "--dry_run", "--limit=2"]) == 0
