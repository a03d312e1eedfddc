"""The stages of dvc.yaml, one script each."""

import os

from pipeline.infra.signals import dvc_pid
from stages.support import inputs  # noqa: F401  (before the code that it looks at is imported)

# who started this process, before slow imports give it time to die
PARENT = os.getppid()
STARTER = dvc_pid(PARENT)
