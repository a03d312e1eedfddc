"""The stages of dvc.yaml, one script each."""

import os

from pipeline.interruption import starter_of
from stages import inputs  # noqa: F401  (before the code that it looks at is imported)

# who started this process, before slow imports give it time to die
PARENT = os.getppid()
STARTER = starter_of(PARENT)
