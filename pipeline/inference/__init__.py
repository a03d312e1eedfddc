"""Executors, which run a ResNet under a policy."""
