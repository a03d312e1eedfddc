"""Figures for papers and READMEs, one module for each kind of question."""
