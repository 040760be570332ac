"""What comes after the CNN: one file and one YAML an experiment, used by class path; `main.py` is the same."""
