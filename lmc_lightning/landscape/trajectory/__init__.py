"""The way of a run through parameter space, and where many runs end."""
