"""Runs, models and experiments in MLflow. Only this folder knows it; no result depends on it."""
