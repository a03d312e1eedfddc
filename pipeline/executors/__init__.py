"""Executors: ways to run a ResNet under a policy for each image, all giving the same logits.

`pipeline.inference` chooses among them.
"""
