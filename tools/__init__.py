"""Commands for people, called by the Makefile. No stage imports them."""

import pipeline  # noqa: F401  (before PyTorch: it says how OpenMP's threads wait)
