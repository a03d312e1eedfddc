"""BlockDrop: a policy network decides, image by image, which residual blocks of a ResNet run.

The library behind `stages/`. It knows nothing of DVC, and only `pipeline.tracking` knows MLflow.
"""
