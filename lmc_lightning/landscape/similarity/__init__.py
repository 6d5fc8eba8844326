"""How alike two networks are: in parameters, in predictions, and layer by layer."""
