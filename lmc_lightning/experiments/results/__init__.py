"""What a finished study or run shows: means, correlations, figures, TensorBoard's table, and one page of all."""
