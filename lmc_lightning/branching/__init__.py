"""Exact forks of a training run: snapshots of the trunk, children that leave it, and the family they make up."""
