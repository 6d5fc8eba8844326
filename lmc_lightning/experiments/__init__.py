"""Studies: many runs with their children and pairs, from one plan, on one machine or many."""
