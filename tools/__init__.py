"""The users' commands, most of which the Makefile calls. No stage imports them."""

import pipeline  # noqa: F401  (before PyTorch: it says how OpenMP's threads wait)
