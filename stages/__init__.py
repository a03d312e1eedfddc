"""The stages of dvc.yaml, one script each."""

import os

from stages.support import inputs  # noqa: F401  (before the code that it looks at is imported)

PARENT = os.getppid()  # now: the slow imports that follow give DVC time to die
