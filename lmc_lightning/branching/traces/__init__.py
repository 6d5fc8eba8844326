"""What any run of a family leaves of itself: weights, curves, and digests of what it was trained on."""
