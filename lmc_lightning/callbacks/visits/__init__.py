"""When a state is measured, on what, at which cost, and what is told of it."""
