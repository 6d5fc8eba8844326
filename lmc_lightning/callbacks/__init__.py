"""Lightning adapters: when to measure, on what, and where the numbers go."""
