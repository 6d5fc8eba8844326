"""What is compared, one module per task: ``contenders(work)`` and ``errors(work, found)``."""
