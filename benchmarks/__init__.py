"""The same work done by this package and by others, side by side in one process."""
