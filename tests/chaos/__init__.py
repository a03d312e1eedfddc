"""The harness of `make chaos`."""
