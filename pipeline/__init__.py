"""BlockDrop: a policy network decides, image by image, which residual blocks of a ResNet run.

The library behind `stages/`. It knows nothing of DVC, and only `pipeline.tracking` knows MLflow.
"""

import os

# How long a waiting OpenMP thread spins before it sleeps. Beside other programs libgomp's 300,000 rounds
# keep a core from whoever would work on it; with none, waking up takes longer than a small operation.
# OpenMP reads it when PyTorch is loaded, so this package is imported before PyTorch everywhere.
SPINS = "2000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
