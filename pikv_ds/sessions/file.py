"""The file of a saved session: safetensors with a checksum over everything in it. Written whole or not at all, for its owner only.

Metadata "pikv": JSON of "format", "about" (JSON, what the tensors are of) and "checksum" (of all tensors and of "about"). One entry, as
safetensors writes several in any order, and equal sessions are equal files.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv_ds.errors import SessionError

FORMAT = "pikv session 1"


def write(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Replace `path` by a file of these tensors, on the host, contiguous, and of what JSON can say about them. Returns its bytes.

    Atomic: who reads `path` meanwhile finds the earlier file or none. Mode 0600, on the disk when this returns.

    Raises: OSError; the earlier file is still there then.
    """
    from safetensors.torch import save_file

    path, text = Path(path), json.dumps(about, sort_keys=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # 0600
    try:
        said = {"format": FORMAT, "about": text, "checksum": _checksum(tensors, text)}
        save_file(dict(tensors), name, {"pikv": json.dumps(said)})
        os.fchmod(handle, 0o600)
        os.fsync(handle)
        size = os.stat(name).st_size
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    finally:
        os.close(handle)
    _sync_folder(path.parent)
    return size


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and what is said about them. Raises: SessionError for a file that is missing, cut short, changed or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), "pt") as file:
            said = _said(file.metadata())
            if said.get("format") != FORMAT:
                raise SessionError(
                    f"{str(path)!r} has format {said.get('format')!r}, and this version reads {FORMAT!r}; save the session anew with this "
                    f"version"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise SessionError(f"{str(path)!r} can't be read: {error.strerror or error}; give a file that save() wrote") from error
    except SafetensorError as error:
        raise SessionError(f"{str(path)!r} is no session, or was cut short: {error}; save it again") from error
    text = said.get("about", "")
    if _checksum(tensors, text) != said.get("checksum"):
        raise SessionError(f"{str(path)!r} was changed after it was written: its checksum differs; save the session again")
    return tensors, json.loads(text)


def _said(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Empty for a file that says nothing, or nothing that can be read."""
    try:
        said = json.loads((metadata or {}).get("pikv", "{}"))
    except json.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    total = blake2b(about.encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        total.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        if x.numel():
            total.update(x.contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _sync_folder(folder: Path) -> None:
    """The new name, too, is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
