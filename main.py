"""The command line: `python main.py {fit,validate,test,predict} --config configs/base.yaml [--key=value ...]`."""

import signal
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what follows takes seconds: Ctrl-C ends it without a traceback

from lightning.pytorch.cli import ArgsType

import mnist_cnn  # noqa: F401  its classes are known by their short names in YAML
from mnist_cnn.cli import ExperimentCLI
from mnist_cnn.files import keep_streams


def main(args: ArgsType = None) -> ExperimentCLI:
    """Parses, builds and runs what the YAML says.

    Args:
        args: The command line, as a list; None: that of the process.

    Returns:
        The CLI object, with config, model, datamodule and trainer.
    """
    return ExperimentCLI(args)


def preload() -> None:
    """Prepares the process from which sweep.py forks its runs."""
    from mnist_cnn.preload import fill_caches

    fill_caches(main, str(Path(__file__).parent / "configs/base.yaml"))


if __name__ == "__main__":
    keep_streams()
    main()
