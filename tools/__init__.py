"""Commands for people, called by the Makefile. No stage imports them."""
