"""The machinery of a run."""
