"""The quantities of the literature, as functions of objectives."""
