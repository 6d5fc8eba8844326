"""What samples allow to say: standard errors, bands, correlations over runs."""
