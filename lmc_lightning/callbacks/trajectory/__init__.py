"""The weights that runs have passed through: kept, collected, drawn."""
