"""Models of our own, and reading them: one file a family, `load.py` for checkpoints, `generate.py` for text."""
