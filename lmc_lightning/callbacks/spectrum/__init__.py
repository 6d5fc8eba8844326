"""What a spectrum may be asked for, and what is logged of it."""
