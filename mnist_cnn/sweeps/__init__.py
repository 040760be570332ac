"""Many runs: what sweep.py stands on. Knows LightningCLI and run folders, not MNIST."""
