"""The command line: `python main.py {fit,validate,test,predict} --config configs/base.yaml [--key=value ...]`."""

import mnist_cnn  # noqa: F401  gives its classes short names in YAML
from mnist_cnn.run.cli import ExperimentCLI


def main(args: list[str] | None = None) -> ExperimentCLI:
    """Runs the experiment that the YAML describes.

    Args:
        args: Command-line arguments as a list; None: those of the process.

    Returns:
        The CLI object, with config, model, datamodule and trainer.
    """
    return ExperimentCLI(args)


if __name__ == "__main__":
    main()
