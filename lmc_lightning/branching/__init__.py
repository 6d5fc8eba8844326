"""Exact forks of a training run, and who descends from whom."""
