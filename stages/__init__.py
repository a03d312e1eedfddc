"""The stages of dvc.yaml, one script each."""

import os

# who started this process, before slow imports give it time to die
PARENT = os.getppid()
