"""Lightning data modules whose order and augmentation are functions of a seed and the epoch."""
