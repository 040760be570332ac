"""Config files and command-line arguments, before and after jsonargparse parses them."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import yaml

from mnist_cnn.run.errors import UserError

SUBCOMMANDS = ("fit", "validate", "test", "predict")


def with_subcommand(args: list[str]) -> list[str]:
    """Moves the subcommand to the front; without one, the options are those of fit."""
    for index, (before, arg) in enumerate(itertools.pairwise(["", *args])):
        is_value = before.startswith("-") and "=" not in before
        if arg in SUBCOMMANDS and not is_value:
            return [arg, *args[:index], *args[index + 1 :]]
    only_options = args and args[0].startswith("-") and args[0] not in ("-h", "--help")
    return ["fit", *args] if only_options else args


def check_config_files(args: list[str]) -> None:
    """Checks that the config files of a command line are YAML with settings; jsonargparse would not name the file."""
    for arg, value in itertools.pairwise([*args, ""]):
        name = value if arg in ("-c", "--config") else arg.removeprefix("--config=")
        if name == arg or not os.path.isfile(name):
            continue
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file {name} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"config file {name} has no settings (key: value)")


def swept_values(path: Path) -> dict[str, Any]:
    """The swept settings (key -> value) that sweep.py writes into a config's first line; {} for other files."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return json.loads(line.removeprefix("# swept: ")) if line.startswith("# swept: ") else {}


def flatten(config: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested config: path of keys -> value. Lists and empty mappings are leaves."""
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {leaf: value for key, inner in config.items() for leaf, value in flatten(inner, (*path, key)).items()}
