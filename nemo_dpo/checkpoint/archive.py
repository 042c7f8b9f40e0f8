"""Read and write `.nemo` archives: a tar of `./model_config.yaml`, `./model_weights/` and tokenizer artefacts.

The names and the layout are those of NeMo 2.0's save-restore connector. Archives come from strangers, so reading trusts
nothing: only regular files and folders below the target are ever created, and what is claimed must fit on the disk.
Writing is atomic: a reader finds the old archive or the new one, never half of one. Only the standard library and yaml
are imported, so that a command can refuse a bad checkpoint before the seconds-long imports of torch and megatron-core.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nemo_dpo.checkpoint import CheckpointError, io_error
from nemo_dpo.checkpoint.model_yaml import MODEL_CONFIG, parse_config
from nemo_dpo.checkpoint.tar import Span, TarPath, TarWriter

MODEL_WEIGHTS = "model_weights"
MAX_MEMBERS = 100_000
MAX_CONFIG_BYTES = 16 * 2**20
# Of a gzipped archive: what it may unpack to. Weights shrink by less than half, tokenizers to a tenth.
MAX_EXPANSION = 100
ALWAYS_ALLOWED = 256 * 2**20
TAR_BLOCK = 512
GZIP_MARK = b"\x1f\x8b"
LEGACY_WEIGHTS = ("model_weights.ckpt", "mp_rank_", "tp_rank_")
Check = Callable[[Path, Path], None]  # refuses a folder that is incomplete; the second path is what the message names


def read_model_config(path: Path) -> dict[str, Any]:
    """The parsed `model_config.yaml` of a `.nemo` file or of an extracted folder; nothing is written to disk.

    Raises:
        CheckpointError: no such file, not an archive, damaged, or without a readable `model_config.yaml`.
    """
    if path.is_dir():
        file = path / MODEL_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{path}: holds no {MODEL_CONFIG}; give a .nemo file or an extracted .nemo folder")
        _check_config_size(file.stat().st_size, path)
        return parse_config(file.read_bytes(), path)
    with _open_tar(path) as tar:
        for name, member in _members(tar, path):
            if name == PurePosixPath(MODEL_CONFIG) and member.isreg():
                _check_config_size(member.size, path)
                return parse_config(_open_member(tar, member).read(), path)
    raise CheckpointError(f"{path}: holds no {MODEL_CONFIG}; it is not a complete .nemo archive")


def _check_config_size(size: int, path: Path) -> None:
    if size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: {MODEL_CONFIG} has {size} bytes, limit {MAX_CONFIG_BYTES}; not trusted")


def check_complete(folder: Path, source: Path) -> None:
    """Refuse a folder that lacks the config or the weights; `source` is what the message names."""
    check_any_layout(folder, source)
    if not (folder / MODEL_WEIGHTS).is_dir():
        raise CheckpointError(
            f"{source}: holds weights of the older layout ({legacy_entries(folder)[0]}); convert it with "
            "tools/convert/convert_gpt_nemo_to_mcore.py first"
        )


def check_any_layout(folder: Path, source: Path) -> None:
    """As `check_complete`, for readers that take the older layout (`legacy_entries`) as well."""
    if not (folder / MODEL_CONFIG).is_file():
        raise CheckpointError(f"{source}: holds no {MODEL_CONFIG}; it is not a complete .nemo archive")
    if (folder / MODEL_WEIGHTS).is_dir():
        return
    if not legacy_entries(folder):
        raise CheckpointError(f"{source}: holds no {MODEL_WEIGHTS}/ folder; it is not a complete .nemo archive")
    if is_adapter(read_model_config(folder)):
        raise CheckpointError(f"{source}: holds an adapter, not a model; give the .nemo of its base here")


def legacy_entries(folder: Path) -> list[str]:
    """Names in `folder` that hold weights of NeMo 1.x: one file, or a folder for every model-parallel rank."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(LEGACY_WEIGHTS))


def is_adapter(config: dict[str, Any]) -> bool:
    """Whether a model_config.yaml is that of an adapter (NeMo's `peft` section), not of a whole model."""
    section = config.get("peft")
    return isinstance(section, dict) and section.get("peft_scheme") not in (None, "none")


def extract(path: Path, into: Path, check: Check = check_complete) -> None:
    """Write the contents of the archive `path` below the folder `into`, which is created.

    Owners, permissions and times in the archive are ignored. `check` sees the result.

    Raises:
        CheckpointError: absolute or climbing names, links, devices, sparse or repeated files, more bytes than the disk
            has room for or than an archive of its size can hold, a truncated or incomplete archive.
    """
    into.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(into).free
    seen: set[PurePosixPath] = set()
    with _open_tar(path) as tar:
        for name, member in _members(tar, path):
            room -= member.size
            if room < 0:
                raise CheckpointError(f"{path}: more data than free disk space at {into}; free some space")
            if name in seen and not member.isdir():
                raise CheckpointError(f"{path}: holds '{name}' twice")
            seen.add(name)
            _extract_member(tar, member, into / name)
        _check_end_mark(tar, path)
    check(into, path)


@contextlib.contextmanager
def open_folder(path: Path, scratch: Path | None = None, check: Check = check_complete) -> Iterator[Path]:
    """A folder with the contents of `path`: itself if it is one, else a temporary extraction, removed afterwards.

    Args:
        path: a `.nemo` file or an extracted folder.
        scratch: where the temporary folder is made; default the system's folder for temporary files.
        check: what the folder must hold.
    """
    if path.is_dir():
        check(path, path)
        yield path
        return
    if not path.is_file():
        raise CheckpointError(f"{path}: no such .nemo file or folder")
    with tempfile.TemporaryDirectory(prefix="nemo_dpo_", dir=scratch) as folder:
        extract(path, Path(folder), check)
        yield Path(folder)


@contextlib.contextmanager
def open_parts(
    path: Path, scratch: Path | None = None, unpack: Callable[..., AbstractContextManager[Path]] | None = None
) -> Iterator[tuple[Path, Traversable]]:
    """(folder with all but the weights, folder of the weights) of `path`.

    The weights of a plain tar are read where they are; nothing large is copied. What is not a plain tar with torch's
    distributed checkpoint in it, `unpack`, by default `open_folder`, makes a folder of.
    """
    spans = _plain_spans(path) if path.is_file() and not _is_gzip(path) else {}
    if PurePosixPath(MODEL_WEIGHTS, ".metadata") not in spans:
        with (unpack or open_folder)(path, scratch) as folder:
            yield folder, folder / MODEL_WEIGHTS
        return
    small = {name: span for name, span in spans.items() if name.parts[0] != MODEL_WEIGHTS}
    with tempfile.TemporaryDirectory(prefix="nemo_dpo_", dir=scratch) as into:
        _copy_members(path, small, Path(into))
        if not (Path(into) / MODEL_CONFIG).is_file():
            raise CheckpointError(f"{path}: holds no {MODEL_CONFIG}; it is not a complete .nemo archive")
        yield Path(into), TarPath(path, spans, PurePosixPath(MODEL_WEIGHTS))


def _copy_members(path: Path, spans: dict[PurePosixPath, Span], into: Path) -> None:
    if sum(span.length for span in spans.values()) > shutil.disk_usage(into).free:
        raise CheckpointError(f"{path}: more data than free disk space at {into}; free some space")
    try:
        for name in spans:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with TarPath(path, spans, name).open("rb") as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, 2**20)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be unpacked ({error.strerror or error})") from error


def _plain_spans(path: Path) -> dict[PurePosixPath, Span]:
    """Where each file of a plain tar is, after the checks of `extract`."""
    found: dict[PurePosixPath, Span] = {}
    with _open_tar(path) as tar:
        for name, member in _members(tar, path):
            if member.isdir():
                continue
            if name in found:
                raise CheckpointError(f"{path}: holds '{name}' twice")
            found[name] = Span(member.offset_data, member.size)
        if both := next((folder for name in found for folder in name.parents if folder in found), None):
            raise CheckpointError(f"{path}: cannot be unpacked ('{both}' is a file and a folder)")
        _check_end_mark(tar, path)
    return found


def write_archive(folder: Path, path: Path, *, overwrite: bool = False, check: Check = check_complete) -> None:
    """Pack `folder` into the plain tar `path`, with names that begin with `./` as NeMo writes them; see `new_archive`.

    `model_config.yaml` comes first, so it is found quickly.
    """
    check(folder, folder)
    with new_archive(path, overwrite=overwrite) as tar:
        tar.add_tree(folder, first=MODEL_CONFIG)


@contextlib.contextmanager
def new_archive(
    path: Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[TarWriter]:
    """A plain tar to fill, which takes the name `path` when the block ends; files need not lie on the disk before.

    The tar grows under a temporary name beside `path`, is flushed to the disk and then renamed; after a failure the
    temporary file is gone and an earlier `path` is untouched.

    Args:
        path: the archive.
        overwrite: replace an existing `path`.
        check: sees the complete archive under its temporary name; if it raises, `path` does not appear.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false.
        SaveError: it cannot be written (disk full, permission).
    """
    check_target(path, overwrite=overwrite)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            tar = TarWriter(file)
            yield tar
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise io_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse to write onto something that exists, unless asked to."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists already; remove it, choose another name or ask to overwrite it")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut: a rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def artefact_name(name: str) -> str:
    """NeMo's name for a file or folder inside an archive: 32 hexadecimal digits, an underscore, the plain name."""
    return f"{uuid.uuid4().hex}_{name}"


def write_model_config(config: dict[str, Any], folder: Path) -> None:
    """Write `config` as `folder/model_config.yaml`, keys in the given order."""
    with (folder / MODEL_CONFIG).open("w", encoding="utf-8") as file:
        yaml.safe_dump(config, file, sort_keys=False, allow_unicode=True)


class _Bounded:
    """A file of which only so much is asked at once: tarfile reads a long name of any claimed length into memory."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_CONFIG_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a plain or gzipped tar; whatever is wrong with the file becomes a CheckpointError of one line."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such .nemo file or folder")
    try:
        with (
            gzip.open(path) if _is_gzip(path) else path.open("rb") as file,
            tarfile.open(fileobj=_Bounded(file), mode="r:") as tar,  # type: ignore[call-overload]
        ):
            yield tar
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be unpacked ({error.strerror or error})") from error
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a .nemo archive, truncated or damaged ({error}); copy it again") from error


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GZIP_MARK)) == GZIP_MARK


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """Name and header of each member, checked before its contents are read or passed over."""
    size = path.stat().st_size
    left = max(MAX_EXPANSION * size, ALWAYS_ALLOWED) if _is_gzip(path) else size
    for number, member in enumerate(tar):
        left -= member.size
        if left < 0 or member.size < 0:
            raise CheckpointError(
                f"{path}: '{member.name}' claims {member.size} bytes, more than an archive of {size} can hold; "
                "truncated (copy it again) or not trusted"
            )
        if number >= MAX_MEMBERS:
            raise CheckpointError(f"{path}: holds over {MAX_MEMBERS} files and folders; not trusted")
        yield _checked_name(member, path), member


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    reader = tar.extractfile(member)
    if reader is None:
        raise tarfile.ReadError(f"'{member.name}' is not a file")
    return reader


def _checked_name(member: tarfile.TarInfo, path: Path) -> PurePosixPath:
    """The member's name without a leading `./`; refused if it leads out of the target folder or is no plain file."""
    pure = PurePosixPath(member.name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in member.name or "\0" in member.name:
        raise CheckpointError(f"{path}: {member.name!r} would be written outside the target folder; not trusted")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise CheckpointError(f"{path}: {member.name!r} is a link, a device or a sparse file; not trusted")
    return pure


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _open_member(tar, member) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _check_end_mark(tar: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a file that ends between two members for whole; the format asks for a block of zeros at the end.

    Reading on to the very end makes gzip compare its checksum.
    """
    file = tar.fileobj
    if file is None:
        raise CheckpointError(f"{path}: closed while it was read")
    file.seek(tar.offset)
    if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise CheckpointError(f"{path}: the archive is truncated (no end mark); copy it again")
    while file.read(2**20):
        pass
