"""Predictions for images, and the code by which MLflow serves a logged model."""
