"""Errors that the user can mend: their message is all that is shown, without a traceback."""

import errno

from pipeline.infra.safe_io import printable

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "make its file system writable",
    errno.EIO: "look after the disk, or move the project to another one",
    errno.ENOENT: "`dvc repro` makes what is missing",
    errno.EEXIST: "move what stands in the place of a folder",
    errno.ENOTDIR: "move what stands in the place of a folder",
    errno.EISDIR: "move the folder that stands in its place",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENOLCK: "keep the project on a file system with locks",
    errno.ENOSYS: "keep the project on a file system with locks",
}


class UserError(ValueError):
    """The message names the key or file, what is wrong with it, and the remedy.

    Each argument is a line of it, with whatever names of files or values it holds made printable.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


class DataError(UserError):
    """Data can't be used; the message names the file, what is wrong with it and the remedy."""


def explain(error: OSError) -> str | None:
    """One line on a file that the system would not read or write; None where there is no remedy."""
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    return f"{printable(error.filename or 'a file')}: {error.strerror}; {remedy}, and repeat"


def explain_memory(error: BaseException) -> str | None:
    """One line on memory that was not enough, the CPU's or a device's; None for other errors."""
    # torch.OutOfMemoryError is a RuntimeError, and so is what PyTorch raises for the CPU
    words = ("out of memory", "not enough memory", "can't allocate memory", "dataloader worker")
    says_so = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    if not says_so and not isinstance(error, MemoryError):
        return None
    first = (str(error).strip() or "MemoryError").splitlines()[0]
    if "DataLoader worker" in first:
        return (
            f"a process that decodes images was killed ({first}); mostly memory or /dev/shm is full: "
            "lower BLOCKDROP_WORKERS or batch_size in params.yaml, and repeat"
        )
    return (
        f"out of memory ({first}); lower batch_size in the stage's section of params.yaml, or free what "
        "others hold (`nvidia-smi` shows who), and repeat"
    )
