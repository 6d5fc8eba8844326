"""A study's tasks: what each does, and where and in which order they are done."""
