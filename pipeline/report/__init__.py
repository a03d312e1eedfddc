"""The page on an experiment, and what it compares."""
