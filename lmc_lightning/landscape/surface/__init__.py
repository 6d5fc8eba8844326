"""The loss on lines and planes through parameter space."""
