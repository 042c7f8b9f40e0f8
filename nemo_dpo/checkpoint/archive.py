"""Read and write `.nemo` archives: a tar of `./model_config.yaml`, `./model_weights/` and tokenizer artefacts.

The names and the layout are those of NeMo 2.0's save-restore connector. Archives come from strangers, so reading trusts
nothing: only regular files and folders below the target are ever created, and what is claimed must fit on the disk.
Writing is atomic: a reader finds the old archive or the new one, never half of one. Only the standard library and yaml
are imported, so that a command can refuse a bad checkpoint before the seconds-long imports of torch and megatron-core.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nemo_dpo.checkpoint import CheckpointError, SaveError

MODEL_CONFIG = "model_config.yaml"
MODEL_WEIGHTS = "model_weights"
MAX_MEMBERS = 100_000
MAX_CONFIG_BYTES = 16 * 2**20
TAR_BLOCK = 512
LEGACY_WEIGHTS = ("model_weights.ckpt", "mp_rank_", "tp_rank_")
Check = Callable[[Path, Path], None]  # refuses a folder that is incomplete; the second path is what the message names


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text; OmegaConf, which wrote most of these files, reads a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_model_config(path: Path) -> dict[str, Any]:
    """The parsed `model_config.yaml` of a `.nemo` file or of an extracted folder; nothing is written to disk.

    Raises:
        CheckpointError: no such file, not an archive, damaged, or without a readable `model_config.yaml`.
    """
    if path.is_dir():
        file = path / MODEL_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{path}: holds no {MODEL_CONFIG}; give a .nemo file or an extracted .nemo folder")
        return _parse_config(file.read_bytes(), path)
    with _open_tar(path) as tar:
        for member in tar:
            if _safe_name(member.name, path) == PurePosixPath(MODEL_CONFIG) and member.isreg():
                if member.size > MAX_CONFIG_BYTES:
                    raise CheckpointError(f"{path}: {MODEL_CONFIG} has {member.size} bytes, limit {MAX_CONFIG_BYTES}")
                return _parse_config(_open_member(tar, member).read(), path)
    raise CheckpointError(f"{path}: holds no {MODEL_CONFIG}; it is not a complete .nemo archive")


def check_complete(folder: Path, source: Path) -> None:
    """Refuse a folder that lacks the config or the weights; `source` is what the message names."""
    if not (folder / MODEL_CONFIG).is_file():
        raise CheckpointError(f"{source}: holds no {MODEL_CONFIG}; it is not a complete .nemo archive")
    if (folder / MODEL_WEIGHTS).is_dir():
        return
    legacy = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(LEGACY_WEIGHTS))
    if legacy and is_adapter(read_model_config(folder)):
        raise CheckpointError(f"{source}: holds an adapter, not a model; give the .nemo of its base here")
    if legacy:
        raise CheckpointError(f"{source}: holds weights of the older layout ({legacy[0]}), which cannot be read yet")
    raise CheckpointError(f"{source}: holds no {MODEL_WEIGHTS}/ folder; it is not a complete .nemo archive")


def is_adapter(config: dict[str, Any]) -> bool:
    """Whether a model_config.yaml is that of an adapter (NeMo's `peft` section), not of a whole model."""
    section = config.get("peft")
    return isinstance(section, dict) and section.get("peft_scheme") not in (None, "none")


def extract(path: Path, into: Path, check: Check = check_complete) -> None:
    """Write the contents of the archive `path` below the folder `into`, which is created.

    Owners, permissions and times in the archive are ignored. `check` sees the result.

    Raises:
        CheckpointError: absolute or climbing names, links, devices, sparse or repeated files, more bytes than the disk
            has room for, a truncated or incomplete archive.
    """
    into.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(into).free
    seen: set[PurePosixPath] = set()
    with _open_tar(path) as tar:
        for member in tar:
            name = _checked_name(member, path)
            room -= member.size
            if room < 0 or len(seen) >= MAX_MEMBERS:
                raise CheckpointError(
                    f"{path}: more data than free disk space at {into}, or over {MAX_MEMBERS} files; free some space"
                )
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


def write_archive(folder: Path, path: Path, *, overwrite: bool = False, check: Check = check_complete) -> None:
    """Pack `folder` into the plain tar `path`, with names that begin with `./` as NeMo writes them.

    The tar grows under a temporary name beside `path`, is flushed to the disk and then renamed; after a failure the
    temporary file is gone and an earlier `path` is untouched. `model_config.yaml` comes first, so it is found quickly.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false.
        SaveError: it cannot be written (disk full, permission).
    """
    check_target(path, overwrite=overwrite)
    check(folder, folder)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for entry in sorted(folder.rglob("*"), key=lambda p: (p.name != MODEL_CONFIG, p.as_posix())):
                    name = f"./{entry.relative_to(folder).as_posix()}"
                    tar.add(entry, arcname=name, recursive=False, filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written: {error.strerror or error}") from error
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


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a plain or gzipped tar; whatever is wrong with the file becomes a CheckpointError of one line."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such .nemo file or folder")
    try:
        with path.open("rb") as file:
            mode = "r:gz" if file.read(2) == b"\x1f\x8b" else "r:"
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # the mode is not a literal
            yield tar
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise CheckpointError(f"{path}: not a .nemo archive, truncated or damaged ({error}); copy it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be unpacked ({error.strerror or error})") from error


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    reader = tar.extractfile(member)
    if reader is None:
        raise tarfile.ReadError(f"'{member.name}' is not a file")
    return reader


def _safe_name(name: str, path: Path) -> PurePosixPath:
    """`name` without a leading `./`; refused if it could lead out of the folder that it is unpacked into."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{path}: {name!r} would be written outside the target folder; not trusted")
    return pure


def _checked_name(member: tarfile.TarInfo, path: Path) -> PurePosixPath:
    name = _safe_name(member.name, path)
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise CheckpointError(f"{path}: {member.name!r} is a link, a device or a sparse file; not trusted")
    return name


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


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who made the archive is nobody's business."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(raw, Loader=_YamlLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MODEL_CONFIG} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {MODEL_CONFIG} is a {type(config).__name__}, expected a mapping of keys")
    return _resolve(config, path) if b"${" in raw else config


def _resolve(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill in `${.encoder_seq_length}` and the like: NeMo saves configs as its templates have them.

    Templates refer to their own keys also as `${model.…}`, so the config is put under that name as well.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create({**config, "model": config}), resolve=True)
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{path}: {MODEL_CONFIG}: {str(error).splitlines()[0]}") from error
    return {str(key): value for key, value in resolved.items() if key != "model"}  # type: ignore[union-attr]
