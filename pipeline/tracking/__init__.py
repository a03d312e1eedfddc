"""Runs, models and experiments in MLflow, which no other part of the library knows."""
