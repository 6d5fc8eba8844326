"""A study before it runs: its file, its configurations, and the objects that these describe."""
