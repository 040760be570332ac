"""The command line: `python main.py {fit,validate,test,predict} --config configs/base.yaml [--key=value ...]`."""

from pathlib import Path

import mnist_cnn  # noqa: F401  gives its classes short names in YAML
from mnist_cnn.run.cli import ExperimentCLI


def main(args: list[str] | None = None) -> ExperimentCLI:
    """Runs the command line (None: the process's arguments); returns its config, model, datamodule and trainer."""
    return ExperimentCLI(args, defaults=Path(__file__).parent / "configs/defaults.yaml")


if __name__ == "__main__":
    main()
