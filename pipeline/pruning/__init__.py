"""Structured pruning of the channels inside the blocks; what goes in and comes out stays as it is."""
