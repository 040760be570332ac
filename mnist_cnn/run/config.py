"""Config files and command-line arguments, before and after jsonargparse parses them."""

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from mnist_cnn.run.errors import UserError

SUBCOMMANDS = ("fit", "validate", "test", "predict")
FLAGS = ("-h", "--help", "--print_config")  # options that take no value of their own


def with_subcommand(args: list[str]) -> list[str]:
    """Moves the subcommand to the front; without one, the options are those of fit."""
    takes_value = False
    for index, arg in enumerate(args):
        if not takes_value and not arg.startswith("-"):
            if arg in SUBCOMMANDS or index == 0:  # an unknown word is left for the parser to report
                return [arg, *args[:index], *args[index + 1 :]]
            break
        takes_value = arg.startswith("-") and "=" not in arg and arg not in FLAGS
    return ["fit", *args] if args and args[0] not in ("-h", "--help") else args


def check_config_files(args: list[str]) -> None:
    """Checks that the config files of a command line are YAML with settings; jsonargparse would not name the file."""
    names = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    names += [value for arg, value in itertools.pairwise(args) if arg in ("--config", "-c")]
    for path in [Path(name) for name in names if "{" not in name and Path(name).is_file()]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"config file {path} {'is empty' if content is None else 'has no settings (key: value)'}")


def swept_values(path: Path) -> dict[str, Any]:
    """The swept settings (key -> value) that sweep.py writes into a config's first line; {} for other files."""
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    return json.loads(line.removeprefix("# swept: ")) if line.startswith("# swept: ") else {}


def flatten(config: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested config: path of keys -> value. Lists and empty mappings are leaves."""
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {leaf: value for key, inner in config.items() for leaf, value in flatten(inner, (*path, key)).items()}
