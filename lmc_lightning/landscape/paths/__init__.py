"""Networks joined by lines and curves: states, metrics along the way, and barriers."""
