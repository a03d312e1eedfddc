"""Files of torch.save from unknown hands, opened in little more memory than they have bytes.

`torch.load(weights_only=True)` runs no code, but a few bytes can make it reserve any amount: by
functions that take a size, storages that claim one, records that inflate. So the pickle in a file is
first read with stand-ins that keep nothing, and an archive is copied, record by record, as it is seen
here.
"""

import argparse
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from pipeline.infra.safe_io import open_regular

MAX_OPCODES = 10**6  # of a pickle; a ResNet-152 has about 28,000
ITEM_BYTES = {
    "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "ShortStorage": 2, "HalfStorage": 2,
    "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8,
}  # fmt: skip
HARMLESS = frozenset({  # what weights_only allows as well and what takes no memory by a number
    "_codecs.encode", "builtins.set", "__builtin__.set", "collections.Counter", "torch.Size",
    "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
})  # fmt: skip
OPCODES = frozenset({  # those that weights_only knows
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID", "MARK", "APPEND", "APPENDS",
    "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST",
    "EMPTY_DICT", "EMPTY_SET", "NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
})  # fmt: skip


def load(path: Path, limit: int) -> Any:
    """What is in the file: plain values, tensors, and argparse.Namespace.

    Raises:
        OSError: it can't be opened, is no plain file, or has over `limit` bytes.
        pickle.UnpicklingError: it holds other types.
        Exception: it is damaged; the kind is what the damaged bytes happen to break.
    """
    with open_regular(path, limit) as file:
        if file.read(4) == b"PK\x03\x04":  # as torch.load tells the two formats apart
            content = _copy_of_archive(file, path.stat().st_size)
        else:
            file.seek(0)
            content = io.BytesIO(file.read())
            _look_through(content)
    content.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(content, map_location="cpu", weights_only=True)


def _copy_of_archive(file: io.BufferedReader, size: int) -> io.BytesIO:
    """The records of a zip file, in one that no other reader can understand otherwise."""
    content = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(content, "w") as new:
        records = {record.filename: record for record in old.infolist()}
        if sum(record.file_size for record in old.infolist()) > size:
            raise ValueError("its records inflate to more than the file")
        if len(records) < len(old.infolist()):
            raise ValueError("two of its records have the same name")
        for name, record in records.items():
            read = old.read(record)
            new.writestr(zipfile.ZipInfo(name), read)
            if name.endswith("/data.pkl") and name.count("/") == 1:
                _require_records(_Claims.of(read), records, name.removesuffix("data.pkl"))
    return content


def _require_records(claims: dict[str, int], records: dict[str, zipfile.ZipInfo], top: str) -> None:
    for key, claimed in claims.items():
        name = f"{top}data/{key}"
        if name in records and records[name].file_size < claimed:
            raise ValueError(f"it claims a storage of {claimed:,} bytes in a record of fewer")


def _look_through(content: io.BytesIO) -> None:
    """The older format: pickles of a number, a version, the system, the content, the storages' keys."""
    start = total = 0
    for _ in range(5):
        end = _end_of(content)
        total += sum(_Claims.of(content.getvalue()[start:end]).values())
        start = end
    if total > len(content.getbuffer()):
        raise ValueError(f"it claims storages of {total:,} bytes, more than it has")


def _end_of(content: io.BytesIO) -> int:
    """Read over a pickle without making anything of it."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"Unsupported operand {opcode.name}")
        if number > MAX_OPCODES or ("PUT" in opcode.name and int(argument or 0) > number):
            raise ValueError("its pickle has over a million steps, or claims it")
    return content.tell()


class _Nothing:
    """Stands for whatever a pickle makes."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("Can only build state for OrderedDict and argparse.Namespace")


class _Claims(pickle.Unpickler):
    """Reads a pickle for the bytes that each storage in it claims."""

    @classmethod
    def of(cls, content: bytes) -> dict[str, int]:
        """The bytes of each storage, by its key."""
        if _end_of(io.BytesIO(content)) != len(content):
            raise ValueError("there is more behind its pickle")
        reader = cls(io.BytesIO(content))
        reader.claims = {}
        reader.load()
        return reader.claims

    claims: dict[str, int]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        plain = {"collections.OrderedDict": OrderedDict, "argparse.Namespace": argparse.Namespace}
        if full in plain:
            return plain[full]
        if module in ("torch", "torch.cuda") and name in ITEM_BYTES:
            return name
        if full in HARMLESS or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return _Nothing
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full}")

    def persistent_load(self, pid: Any) -> _Nothing:
        what, kind, key, _, count, *_ = pid
        if what not in ("storage", b"storage") or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it refers to something other than storages")
        self.claims[str(key)] = max(self.claims.get(str(key), 0), count * ITEM_BYTES[kind])
        return _Nothing()
