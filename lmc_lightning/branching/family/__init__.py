"""What a family is, on disk: its runs, who descends from whom, who trains which, and the files they share."""
