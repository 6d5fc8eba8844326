"""The same numbers without a trainer, and a part of a run once more."""
