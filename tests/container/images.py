"""Images built and run without an engine or a daemon: buildah with chroot isolation, and namespaces of our own.

Needs root. The base is a small Debian with Python, made by mmdebstrap once and kept. The host's settings of pip and apt
are mounted while RUN lines run; they are part neither of the image's files nor of its history.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("NEMO_DPO_IMAGE_CACHE", Path(tempfile.gettempdir()) / "nemo_dpo_images"))
BASE = "localhost/debian-python"
TOOLS = ("buildah", "mmdebstrap", "unshare", "chroot")


def reason_to_skip() -> str | None:
    """Why no image can be built here, or None."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install buildah mmdebstrap)"
    if os.geteuid() != 0:
        return "images are built as root"
    if platform.freedesktop_os_release().get("ID") != "debian":
        return "the base image is made from the packages of a Debian host"
    return None


def buildah(*words: str | Path) -> str:
    """What a buildah command prints; CalledProcessError, with its messages, if it fails."""
    driver = os.environ.get("NEMO_DPO_IMAGE_DRIVER", "overlay")
    command = ["buildah", "--storage-driver", driver, "--root", CACHE / "storage", "--runroot", CACHE / "run", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise AssertionError(f"buildah {words[0]}: {done.stdout[-4000:]}")
    return done.stdout.strip()


def has_image(name: str) -> bool:
    """Whether the store holds it."""
    return name in buildah("images", "--format", "{{.Name}}").split()


def make_base() -> None:
    """A Debian of the host's release with Python and pip."""
    if has_image(BASE):
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / "base.tar"
    sources = Path("/etc/apt/sources.list.d").glob("debian.sources")
    settings = 'rm -rf "$1"/etc/apt/sources.list* "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/resolv.conf'
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase"),
            "--include=python3,python3-pip,python-is-python3,ca-certificates",
            f"--customize-hook={settings}",
            '--customize-hook=rm -f "$1"/etc/hostname "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED',
            platform.freedesktop_os_release()["VERSION_CODENAME"],
            *(archive, *sources),
        ],
        check=True,
    )
    box = buildah("from", "scratch")
    buildah("add", "--quiet", box, archive, "/")
    buildah(
        "config", "--cmd", "bash", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", box
    )
    buildah("commit", "--quiet", "--rm", box, BASE)
    archive.unlink()


def build(context: Path, name: str) -> str:
    """Build the Dockerfile of `context` on the small base; returns buildah's messages."""
    make_base()
    with tempfile.TemporaryDirectory() as private:
        mounts = ["/etc/apt:/etc/apt:ro", *pip_mounts(Path(private) / "pip.conf")]
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        options = ("--isolation", "chroot", "--layers", "--build-arg", f"BASE_IMAGE={BASE}", *volumes)
        return buildah("build", *options, "--tag", name, "--file", context / "Dockerfile", context)


def pip_mounts(target: Path) -> list[str]:
    """The host's pip settings in force as one file `target`, and the mounts that they need in an image.

    Local files and folders that they name are called /mnt/pip/N inside.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:") and (name not in settings or section == ":env:"):
            settings[name] = ast.literal_eval(value)
    folders: dict[str, int] = {}

    def inside(word: str) -> str:
        # A local index ("file:///…/simple") links to files beside its folder, so its parent is mounted.
        url = "file://" if word.startswith("file://") else ""
        path = word.removeprefix(url).rstrip("/")
        if not os.path.isabs(path) or not os.path.exists(path):
            return word
        folder, name = os.path.split(path) if url else (path, "")
        mount = f"/mnt/pip/{folders.setdefault(folder, len(folders))}"
        return url + os.path.join(mount, name) if name else mount

    lines = [f"{name} = {' '.join(map(inside, value.split()))}\n" for name, value in settings.items()]
    target.write_text("[global]\n" + "".join(lines), encoding="utf-8")
    return [f"{target}:/etc/pip.conf:ro", *(f"{folder}:/mnt/pip/{number}:ro" for folder, number in folders.items())]


@dataclass(frozen=True)
class Box:
    """A writable copy of an image as a folder, with what its config says of running it."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def of(cls, image: str) -> Box:
        name = buildah("from", "--pull-never", image)
        config = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
        return cls(name, Path(buildah("mount", name)), config)

    def remove(self) -> None:
        """Unmount and delete the copy."""
        buildah("rm", self.name)

    def command(
        self, words: Sequence[str | Path], mounts: Iterable[Path] = (), user: str | None = None, env: Sequence[str] = ()
    ) -> list[str]:
        """The command that runs `words` behind the image's entry point as process 1 of a namespace, as engines do.

        Args:
            words: empty for the image's own command.
            mounts: folders that are to be at the same path inside.
            user: numbers of another user than the image's, user:group.
            env: NAME=value beside the image's own.
        """
        inner = [*(self.config.get("Entrypoint") or []), *(map(str, words) if words else self.config["Cmd"])]
        enter = ["env", "-i", *self.config["Env"], *env, "sh", "-c", 'cd "$0" && exec "$@"', self.config["WorkingDir"]]
        binds = [f'mkdir -p "$0{path}" && mount --bind "{path}" "$0{path}"' for path in mounts]
        system = ['mount -t proc proc "$0/proc"', 'mount --rbind /dev "$0/dev"', 'mount -t tmpfs tmpfs "$0/tmp"']
        script = " && ".join([*system, *binds, 'exec "$@"'])
        chroot = ["chroot", f"--userspec={user or self.config['User']}", self.folder]
        namespaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        return [*map(str, [*namespaces, "sh", "-c", script, self.folder, *chroot, *enter, *inner])]
