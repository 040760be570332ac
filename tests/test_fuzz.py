"""Configs and grids that nobody would write: each ends in a good run or in one clear line, never in a traceback.

The examples are the same ones each time. FUZZ_EXAMPLES=1000 asks for so many others, at random.
"""

import contextlib
import copy
import datetime
import functools
import io
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import yaml
from conftest import QUIET, REPO
from hypothesis import HealthCheck, Phase, given, settings, strategies

import sweep
from main import main
from mnist_cnn.cli import RunFolder

MORE = os.environ.get("FUZZ_EXAMPLES")
TEXT = (REPO / "configs/base.yaml").read_text(encoding="utf-8")
# What makes a run short, and what would start other processes.
LAST = [
    *QUIET,
    f"--data.data_dir={REPO / 'data'}",
    "--data.num_workers=0",
    "--trainer.max_time=00:00:00:02",
    "--trainer.devices=1",
    "--trainer.accelerator=cpu",
]
FEW = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "max_epochs": 1}
CONFIG = yaml.safe_load(TEXT)
CONFIG["trainer"] |= FEW
ODD = [
    *(None, True, False, -1, 0, 1, 3, 0.5, 1e308, math.nan, math.inf, 2**62, 10**30),
    *("", " ", "-1", "null", "1e3", "CNN", "SGD", "EarlyStopping", "mnist_cnn.nets", "nowhere.Class", "os.system"),
    *(
        "builtins.exec",
        "torch.nn.Identity",
        "ü日本",
        "a\nb",
        'it\'s "quoted"',
        "{",
        "a: b",
        "%s {x}",
        "x" * 300,
        "a\0b",
    ),
    *(datetime.date(2020, 1, 1), b"\xff\0", [], [None], [[1], 2], {}, {"a": 1}, {1: 2}, {"class_path": "CNN"}),
    *({"init_args": {"lr": 1}}, {"class_path": "os.system", "init_args": {"command": "touch executed"}}),
    *({"class_path": None}, {"class_path": ["SGD"]}, {"class_path": "SGD", "init_args": 3}),
]
SCRAPS = [
    "\t",
    "  ",
    "\ufeff",
    "\0",
    "'",
    '"',
    "{",
    "]",
    ":",
    "- ",
    "#",
    "&a ",
    "*a",
    "!!python/object/apply:os.system ",
    "%",
]
SCRAPS += [
    "!!python/object/apply:os.system ",
    "!tag ",
    "\u2028",
    "|",
    "? ",
    "---\n",
    "\n",
    "trainer: {}\n",
    "<<: 3\n",
    "é",
    "\x80",
    "\ud800",
]


def fuzz(examples: int):
    """A test's settings."""
    return settings(
        max_examples=int(MORE or examples),
        derandomize=not MORE,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def paths(node, path=()):
    """Of each node of a tree but the root."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from paths(node[key], (*path, key))


def changed(tree, path, action, odd):
    """A copy of a tree with one node dropped, renamed or replaced."""
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if action == "replace" or isinstance(node, list):
        node[path[-1]] = odd
    elif action == "drop":
        del node[path[-1]]
    else:
        name = str(path[-1])
        node[{"misspell": name[1:], "repeat": name * 2, "odd name": odd if odd.__hash__ else name + "x"}[action]] = (
            node.pop(path[-1])
        )
    return tree


@strategies.composite
def trees(draw, tree):
    for _ in range(draw(strategies.sampled_from([1, 1, 1, 2, 3]))):
        if found := list(paths(tree)):
            path = draw(strategies.sampled_from(found))
            action = draw(strategies.sampled_from(["replace"] * 6 + ["drop", "misspell", "repeat", "odd name"]))
            tree = changed(tree, path, action, draw(strategies.sampled_from(ODD)))
    return tree


@strategies.composite
def texts(draw, text):
    for _ in range(draw(strategies.sampled_from([1, 1, 2]))):
        start = draw(strategies.integers(0, len(text)))
        end = draw(strategies.sampled_from([start, start + 1, text.find("\n", start) + 1, len(text)]))
        text = text[:start] + draw(strategies.sampled_from(["", *SCRAPS])) + text[max(start, end) :]
    lines = text.splitlines(keepends=True)
    if lines and draw(strategies.booleans()):
        lines.insert(draw(strategies.integers(0, len(lines))), draw(strategies.sampled_from(lines)))
    return "".join(lines)


@contextlib.contextmanager
def empty_folder():
    before = os.getcwd()
    folder = tempfile.mkdtemp()
    try:
        os.chdir(folder)
        yield Path(folder)
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def outcome(command, given: list[str]) -> str:
    """Runs a command beside the files that it is given, sees to it that it ends as it should, and returns its line."""
    errors, steps, end_step = io.StringIO(), [], RunFolder.on_train_batch_end

    def count_step(callback, *args):  # with the first one the run's folder stays, whatever comes
        steps.append(callback)
        end_step(callback, *args)

    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(RunFolder, "on_train_batch_end", count_step),
        ):
            warnings.simplefilter("ignore")
            status = command()
    except SystemExit as ended:
        status = ended.code
    assert not Path("executed").exists()
    lines = errors.getvalue().splitlines()
    if not status or not isinstance(status, int | str):  # main returns its LightningCLI
        assert not [line for line in lines if line.startswith(("error: ", "Traceback"))], lines
        cli = status
        whole = getattr(cli, "run_dir", None) and cli.config_init.fit.evaluate_best
        assert not whole or (cli.run_dir / "metrics.json").is_file()
        return ""
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert steps or sorted(os.listdir()) == given, sorted(Path().rglob("*"))
    return lines[0]


def run(content: str) -> str:
    with empty_folder():
        Path("odd.yaml").write_bytes(content.encode(errors="surrogatepass"))
        return outcome(lambda: main(["fit", "--config=odd.yaml", *LAST]), ["odd.yaml"])


def to_yaml(tree) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@fuzz(30)
@given(tree=trees(CONFIG))
def test_base_with_other_settings(tree):
    run(to_yaml(tree))


@fuzz(30)
@given(text=texts(yaml.safe_dump(CONFIG, sort_keys=False)))
def test_base_with_other_characters(text):
    run(text)


GRID = {
    "name": "odd",
    "base": [str(REPO / "configs/base.yaml")],
    "grid": {"model.optimizer": ["SGD", {"class_path": "Adam"}], "config": [None, ["over.yaml"]]},
    "fixed": {"trainer.max_epochs": 1, "model.lr_scheduler": None, "data": {"batch_size": 32}},
    "metric": "val/acc",
    "mode": "max",
    "limit": 3,
    "retry_failed": True,
    "max_failures": 2,
    "launcher": "local",
    "slurm": {"partition": "main", "time": 60, "runs_at_once": None, "options": {"mem": 0}},
}


class Here:
    """A process that is none."""

    def __init__(self, target, args, daemon):
        self.start, self.join = functools.partial(target, *args), lambda: None


def dry_run(content: str) -> str:
    """Checks a grid as sweep.py does, but in this process: one that has to import everything takes long."""
    with empty_folder():
        Path("over.yaml").write_text("seed_everything: 3")
        Path("odd.yaml").write_bytes(content.encode(errors="surrogatepass"))
        with mock.patch.multiple(sweep, CONTEXT=SimpleNamespace(Process=Here), start_server=lambda _: None):
            return outcome(lambda: sweep.main(["--config=odd.yaml", "--dry_run"]), ["odd.yaml", "over.yaml"])


@fuzz(15)
@given(tree=trees(GRID))
def test_grid_with_other_settings(tree):
    dry_run(to_yaml(tree))


@fuzz(15)
@given(text=texts(to_yaml(GRID)))
def test_grid_with_other_characters(text):
    dry_run(text)
