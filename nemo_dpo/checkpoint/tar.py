"""Plain tars, whose files are bytes at known places: written without a copy beside them, read without unpacking."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Final, NamedTuple

BLOCK = tarfile.BLOCKSIZE
FORMAT: Final = (
    tarfile.GNU_FORMAT
)  # a length of any size fits into the one block of a header, which can be written later


class TarWriter:
    """A tar that grows file by file; names begin with `./` and nobody owns anything."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=FORMAT)

    def add_tree(self, folder: Path, first: str = "") -> None:
        """All that is in `folder`, in the order of the names; `first` comes before the others."""
        for entry in sorted(folder.rglob("*"), key=lambda p: (p.name != first, p.as_posix())):
            name = f"./{entry.relative_to(folder).as_posix()}"
            self._tar.add(entry, arcname=name, recursive=False, filter=_anonymous)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A file `./<name>` to write front to back; its length goes into the tar when the block ends."""
        member = tarfile.TarInfo(f"./{name}")
        header = self._file.tell()
        self._tar.addfile(member)
        begin = self._file.tell()
        yield _Growing(self._file, begin, name)  # type: ignore[misc]  # what torch.save and pickle need of a file
        member.size = self._file.tell() - begin
        self._file.write(bytes(-member.size % BLOCK))
        self._tar.offset = self._file.tell()
        self._file.seek(header)
        self._file.write(member.tobuf(FORMAT))
        self._file.seek(self._tar.offset)

    def close(self) -> None:
        """Write the end mark."""
        self._tar.close()


class _Growing:
    """The end of a file from `begin` on, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, name: str) -> None:
        self._file, self._begin, self.name = file, begin, name
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._begin


class Span(NamedTuple):
    """Where a file's bytes are in the tar."""

    offset: int
    length: int


@dataclass(frozen=True)
class TarPath(Traversable):
    """A file or folder inside a plain tar, with the reading half of `pathlib.Path`.

    Attributes:
        tar: the archive.
        spans: of all its files, by name without a leading `./`.
        at: this one's name.
    """

    tar: Path
    spans: Mapping[PurePosixPath, Span]
    at: PurePosixPath

    @property
    def name(self) -> str:
        return self.at.name

    def __str__(self) -> str:
        return f"{self.tar}:{self.at}"

    def joinpath(self, *descendants: Any) -> TarPath:
        return TarPath(self.tar, self.spans, self.at.joinpath(*descendants))

    def __truediv__(self, child: Any) -> TarPath:
        return self.joinpath(child)

    def is_file(self) -> bool:
        return self.at in self.spans

    def is_dir(self) -> bool:
        return any(self.at in name.parents for name in self.spans)

    def iterdir(self) -> Iterator[TarPath]:
        depth = len(self.at.parts)
        names = {PurePosixPath(*name.parts[: depth + 1]) for name in self.spans if self.at in name.parents}
        return (TarPath(self.tar, self.spans, name) for name in sorted(names))

    def open(self, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """For reading, as bytes (`rb`) or text."""
        if self.at not in self.spans:
            raise FileNotFoundError(2, "No such file in the archive", str(self))
        file = io.BufferedReader(Section(self.tar.open("rb"), self.spans[self.at]))
        return file if "b" in mode else io.TextIOWrapper(file, *arguments, **options)

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return bytes(file.read())

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")


class Section(io.RawIOBase):
    """Some bytes of a file as a file of their own, for reading; the file is closed with it."""

    def __init__(self, file: IO[bytes], span: Span) -> None:
        self._file, self._span, self._at = file, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._span.length}[whence]
        if origin + offset < 0:
            raise OSError(22, "Invalid argument")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        rest = max(0, self._span.length - self._at)
        self._file.seek(self._span.offset + self._at)
        count = int(self._file.readinto(memoryview(buffer)[:rest]))  # type: ignore[attr-defined]  # BufferedReader has
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who made the archive is nobody's business."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
