"""A moment of a run and everything random in it: written beside a checkpoint, and played back in a child."""
