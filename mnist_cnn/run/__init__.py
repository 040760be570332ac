"""One run of an experiment: command line, run folder, loggers, callbacks. Knows nothing of MNIST."""
