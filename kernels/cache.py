"""Compiled code in the user's cache folder: entries by atomic rename, so writers may race."""

import os
import tempfile
from pathlib import Path


def folder(kind: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attnlab" / kind


def write_atomically(path: Path, data: bytes) -> None:
    """Keep an entry; a folder that cannot be written only costs the next process its work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
