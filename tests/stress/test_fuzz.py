"""Configs that nobody would write: each ends in a good run or in one clear line, and nothing in them is executed.

The examples are the same ones each time. FUZZ_EXAMPLES=1000 asks for so many others, at random.
"""

import contextlib
import copy
import datetime
import io
import math
import os
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import pytest
import yaml
from conftest import DATA, QUIET, REPO, main
from hypothesis import HealthCheck, Phase, given, settings, strategies

from mnist_cnn import LitClassifier

TRACEBACKS: tuple[type[Exception], ...] = ()  # what may come out of training with odd values instead of a line
MORE = os.environ.get("FUZZ_EXAMPLES")
# What makes a run short, and what would start other processes.
LAST = [*QUIET, f"--data.data_dir={DATA}", "--data.num_workers=0", "--trainer.max_time=00:00:00:02"]
LAST += ["--trainer.devices=1", "--trainer.accelerator=cpu"]
CONFIG = yaml.safe_load((REPO / "configs/base.yaml").read_text(encoding="utf-8"))
CONFIG["trainer"] |= {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "max_epochs": 1}
NUMBERS = [None, True, False, -1, 0, 1, 3, 0.5, 1e308, math.nan, math.inf, 2**62, 10**30]
WORDS = ["", " ", "-1", "null", "1e3", "CNN", "SGD", "EarlyStopping", "mnist_cnn.nets", "nowhere.Class", "os.system"]
WORDS += ["builtins.exec", "torch.nn.Identity", "ü日本", "a\nb", "it's", '"', "{", "a: b", "%s {x}", "x" * 300, "\0"]
TREES = [[], [None], [[1], 2], {}, {"a": 1}, {1: 2}, {"class_path": "CNN"}, {"init_args": {"lr": 1}}]
TREES += [{"class_path": "os.system", "init_args": {"command": "touch executed"}}, {"class_path": None}]
TREES += [{"class_path": ["SGD"]}, {"class_path": "SGD", "init_args": 3}, datetime.date(2020, 1, 1), b"\xff\0"]
ODD = [*NUMBERS, *WORDS, *TREES]
SCRAPS = ["\t", "  ", "\ufeff", "\0", "'", '"', "{", "]", ":", "- ", "#", "&a ", "*a", "%", "!tag ", "\u2028", "|"]
SCRAPS += ["? ", "---\n", "\n", "trainer: {}\n", "<<: 3\n", "é", "\x80", "\ud800", "!!python/object/apply:os.system "]


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


@strategies.composite
def trees(draw, tree):
    """A tree with nodes dropped, renamed or replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(strategies.sampled_from([1, 1, 1, 2, 3]))):
        *above, key = draw(strategies.sampled_from(list(paths(tree)) or [("model",)]))
        node = tree
        for part in above:
            node = node[part]
        action = draw(strategies.sampled_from(["replace"] * 6 + ["drop", "misspell", "repeat"]))
        if action == "replace" or isinstance(node, list):
            node[key] = copy.deepcopy(draw(strategies.sampled_from(ODD)))
        else:
            value = node.pop(key, None)
            node |= {"drop": {}, "misspell": {str(key)[1:]: value}, "repeat": {str(key) * 2: value}}[action]
    return tree


@strategies.composite
def texts(draw, text):
    """A text with pieces dropped, replaced or doubled."""
    for _ in range(draw(strategies.sampled_from([1, 1, 2]))):
        start = draw(strategies.integers(0, len(text)))
        end = draw(strategies.sampled_from([start, start + 1, text.find("\n", start) + 1, len(text)]))
        text = text[:start] + draw(strategies.sampled_from(["", *SCRAPS])) + text[max(start, end) :]
    lines = text.splitlines(keepends=True)
    if lines and draw(strategies.booleans()):
        lines.insert(draw(strategies.integers(0, len(lines))), draw(strategies.sampled_from(lines)))
    return "".join(lines)


def run(content: str) -> None:
    """Fits, and checks how it ended."""
    errors, steps, step = io.StringIO(), [], LitClassifier.training_step

    def count(*args):  # with the first one the run's folder stays, whatever comes
        steps.append(1)
        return step(*args)

    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(LitClassifier, "training_step", count),
    ):
        patch.chdir(folder)
        warnings.simplefilter("ignore")
        Path("odd.yaml").write_bytes(content.encode(errors="surrogatepass"))
        try:
            cli, status = main(["fit", "--config=odd.yaml", *LAST]), 0
        except SystemExit as ended:
            cli, status = None, ended.code
        except TRACEBACKS:
            cli, status = None, 1
            print("error: a traceback", file=errors)
        lines = errors.getvalue().splitlines()
        assert not Path("executed").exists()
        if status:
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
            assert steps or os.listdir() == ["odd.yaml"], sorted(Path().rglob("*"))
        elif cli:
            assert not [line for line in lines if line.startswith(("error: ", "Traceback"))], lines
            runs = [path.parent for path in Path().rglob("config.yaml")]
            assert not cli.config_init.fit.evaluate_best or all((run / "metrics.json").is_file() for run in runs)


@fuzz(25)
@given(tree=trees(CONFIG))
def test_base_with_other_settings(tree):
    run(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))


@fuzz(25)
@given(text=texts(yaml.safe_dump(CONFIG, sort_keys=False)))
def test_base_with_other_characters(text):
    run(text)
