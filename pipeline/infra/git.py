"""What Git says of the project."""

import subprocess
from pathlib import Path

from pipeline.infra.resume import project_root


def git(*arguments: str, folder: Path | None = None) -> str:
    """The output of a Git command; empty where Git or the repository is missing, or the command fails.

    It also works where the project is another user's folder (a container's mount): its code runs
    anyway. A repository around the project stays refused, because Git would run the commands that its
    settings name.

    Args:
        folder: where to run it; None: the working directory.
    """
    trusted = (folder or project_root()).resolve()
    command = ["git", "-c", f"safe.directory={trusted}", *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
