"""A file of records of one size that is never trusted: each record carries what names it, and nothing is given out that does not check.

| bytes | what |
|---|---|
| 0 to 4095 | the head: magic, version, record_bytes, stride, the number of this file, their CRC |
| 4096 + slot * stride | the record, zeros, and in the last 32 bytes its mark |

A mark is the number of the file, the slot, the serial number of the write, and the CRC-32 of the record and of these. Who reads says which
slot and write is meant, so another file's, another slot's, an earlier or a torn write is named as such. All numbers are little endian.

`commit` lists the pages in a manifest beside the file, replaced by rename; what it lists stays as it is until the next commit, so a process
that dies at any time leaves a file that `open` reads. Files are for their owner alone (0600).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from pikv_ds.errors import PageFileError

from .file_io import FileIO

MAGIC, VERSION, HEAD, ALIGN = b"PIKVPAGE", 1, 4096, 512
_HEAD = struct.Struct("<8sIIIQ")
_MARK = struct.Struct("<4sIQQQ")  # magic, CRC, number of the file, slot, serial
_PAGE = b"PAGE"


class Written(NamedTuple):
    """A write that a reader can ask for."""

    slot: int
    serial: int
    crc: int


class PageFile:
    """Owns the file and which write each slot has. One writer; `io` moves the bytes."""

    def __init__(self, path: Path, record_bytes: int, number: int, io: FileIO) -> None:
        """Made by `create` and `open`."""
        self.path, self.record_bytes, self.number, self.io = path, record_bytes, number, io
        self.stride = -(-(record_bytes + _MARK.size) // ALIGN) * ALIGN
        self.pages: dict[int, Written] = {}
        self.dropped: list[str] = []
        """What `open` has found and does not give out, in words."""
        self.bytes_written = self.bytes_read = 0
        self._serial = 0
        self._listed: set[int] = set()  # slots of the last manifest: not written again before the next

    @classmethod
    def create(cls, path: str | Path, record_bytes: int, io: FileIO) -> Self:
        """A new file, in place of one that may be there. Raises: OSError."""
        path, number = Path(path), int.from_bytes(os.urandom(8), "little")
        file = cls(path, record_bytes, number, io)
        path.unlink(missing_ok=True)
        _manifest(path).unlink(missing_ok=True)
        fields = _HEAD.pack(MAGIC, VERSION, record_bytes, file.stride, number)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as head:
            head.write((fields + struct.pack("<I", zlib.crc32(fields))).ljust(HEAD, b"\0"))
        io.open(path)
        return file

    @classmethod
    def open(cls, path: str | Path, record_bytes: int, io: FileIO) -> Self:
        """The pages of the last commit that check; what does not is in `dropped`.

        Raises: PageFileError for a head or a manifest that is not this file's.
        """
        path = Path(path)
        number = _read_head(path, record_bytes)
        file = cls(path, record_bytes, number, io)
        listed = _read_manifest(path, number)
        io.open(path)
        for written in (Written(*one) for one in listed):
            try:
                file._check(written, io.read([file._at(written.slot)], file.stride)[0])
            except PageFileError as error:
                file.dropped.append(str(error))
            else:
                file.pages[written.slot] = written
            file._serial = max(file._serial, written.serial)
        file._listed = set(file.pages)
        return file

    def write(self, slots: list[int], records: np.ndarray) -> list[Written]:
        """records [n, record_bytes] uint8 into slots; earlier writes there are no more.

        Raises: OSError, for a full disk among others; PageFileError for a slot of the last commit. No page is lost but those of `slots`.
        """
        taken = self._listed.intersection(slots)
        if taken:
            raise PageFileError(f"{self.path}: slot {min(taken)} is in the manifest; release it and commit before it is written again")
        blocks, found = np.zeros((len(slots), self.stride), dtype=np.uint8), []
        blocks[:, : self.record_bytes] = records
        for slot, block in zip(slots, blocks, strict=True):
            self._serial += 1
            self.pages.pop(slot, None)
            written = Written(slot, self._serial, self._crc(slot, self._serial, block))
            block[-_MARK.size :] = np.frombuffer(_MARK.pack(_PAGE, written.crc, self.number, slot, self._serial), dtype=np.uint8)
            found.append(written)
        self.io.write([self._at(slot) for slot in slots], blocks)
        self.bytes_written += blocks.nbytes
        self.pages.update((written.slot, written) for written in found)
        return found

    def read(self, pages: list[Written]) -> np.ndarray:
        """[n, record_bytes] uint8. Raises: PageFileError, and then nothing is given out."""
        blocks = self.io.read([self._at(page.slot) for page in pages], self.stride)
        found = np.empty((len(pages), self.record_bytes), dtype=np.uint8)
        for out, page, block in zip(found, pages, blocks, strict=True):
            out[:] = self._check(page, block)
        self.bytes_read += self.stride * len(pages)
        return found

    def release(self, slots: list[int]) -> None:
        """Their pages are no more."""
        for slot in slots:
            del self.pages[slot]

    @property
    def busy(self) -> set[int]:
        """Slots that can't be written now."""
        return self.pages.keys() | self._listed

    def commit(self) -> None:
        """What is written survives this process, and the machine. Raises: OSError, and then the last manifest holds."""
        self.io.sync()
        pages = [list(page) for page in self.pages.values()]
        body = json.dumps({"version": VERSION, "file": self.number, "pages": pages}, separators=(",", ":"))
        _replace(_manifest(self.path), f"{zlib.crc32(body.encode()):08x}\n{body}")
        self._listed = set(self.pages)

    def close(self, *, remove: bool = False) -> None:
        self.io.close()
        if remove:
            self.path.unlink(missing_ok=True)
            _manifest(self.path).unlink(missing_ok=True)

    def _at(self, slot: int) -> int:
        return HEAD + slot * self.stride

    def _crc(self, slot: int, serial: int, block: np.ndarray) -> int:
        return zlib.crc32(block[: self.record_bytes], zlib.crc32(struct.pack("<QQQ", self.number, slot, serial)))

    def _check(self, page: Written, block: bytes | memoryview | np.ndarray) -> np.ndarray:
        """The record of a block that was read for `page`."""
        where = f"{self.path}: page {page.slot}"
        if len(block) < self.stride:
            raise PageFileError(f"{where} is truncated: {len(block)} of {self.stride} bytes are there")
        block = np.frombuffer(block, dtype=np.uint8)
        magic, crc, number, slot, serial = _MARK.unpack(block[-_MARK.size :].tobytes())
        if magic != _PAGE:
            raise PageFileError(f"{where} has no mark: it was overwritten, or never written")
        if number != self.number:
            raise PageFileError(f"{where} is of another file, number {number:016x}; this is {self.number:016x}")
        if slot != page.slot:
            raise PageFileError(f"{where} is swapped: it holds page {slot}")
        if serial != page.serial:
            raise PageFileError(f"{where} is stale: it holds write {serial}, asked for is write {page.serial}")
        if crc != page.crc or self._crc(slot, serial, block) != crc:
            raise PageFileError(f"{where} is flipped: its bytes do not have the checksum {page.crc:08x}")
        return block[: self.record_bytes]


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".manifest")


def _read_head(path: Path, record_bytes: int) -> int:
    with open(path, "rb") as file:
        head = file.read(HEAD)
    fields = head[: _HEAD.size]
    if len(head) < HEAD or struct.unpack_from("<I", head, _HEAD.size)[0] != zlib.crc32(fields):
        raise PageFileError(f"{path}: its head does not check: it is truncated, or no page file")
    magic, version, size, _, number = _HEAD.unpack(fields)
    if (magic, version, size) != (MAGIC, VERSION, record_bytes):
        raise PageFileError(
            f"{path}: version {version} with records of {size} bytes; asked for are version {VERSION} and {record_bytes} bytes"
        )
    return number


def _read_manifest(path: Path, number: int) -> list[list[int]]:
    try:
        checksum, body = _manifest(path).read_text().split("\n", 1)
        checks = int(checksum, 16) == zlib.crc32(body.encode())
    except FileNotFoundError:
        raise PageFileError(f"{path}: no manifest: nothing of it was committed") from None
    except ValueError:
        checks = False
    if not checks:
        raise PageFileError(f"{_manifest(path)}: does not check: it is truncated or flipped")
    found = json.loads(body)
    if found["file"] != number:
        raise PageFileError(f"{_manifest(path)} is of another file, number {found['file']:016x}; {path.name} is {number:016x}")
    return found["pages"]


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, on disk when this returns."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
