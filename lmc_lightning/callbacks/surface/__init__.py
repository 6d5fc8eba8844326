"""What a surface may be asked for, and what is shown of it."""
