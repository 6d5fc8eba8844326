"""Permutations of channels that bring one network close to another without changing its function."""
