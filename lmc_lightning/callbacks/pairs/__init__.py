"""Two states of a network compared: which, by what, and what is logged of it."""
