"""Without selenium there is nothing to collect here."""

collect_ignore = ["pages.py"]
