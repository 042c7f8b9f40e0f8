"""Patches for `run_cli`: SIGKILL a whole run, all its processes at once, at the moment that its `kill.json` says.

{"rank": 0, "writer": false, "event": 17}: when that rank, or the fork that writes for it in the background, is about to
do the seventeenth thing to the folder of checkpoints (open for writing, fsync, rename, remove …) since its start, or
the first after it.
{"after": 0.4}: so many seconds after the first step began.
{}: never. Whatever is said, a line of kills.txt says what was about to happen, and events.txt lists all there was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.cli.probes import log_dir, wrap

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")
done = {"events": 0, "steps": 0}


def arm() -> None:
    """See the module."""
    from nemo_dpo.training.module import PreferenceModule

    os.setpgrp()  # the group that is killed
    sys.addaudithook(_heard)
    wrap(os, "fsync", _synced)
    wrap(PreferenceModule, "training_step", _stepped)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
        return
    if event == "open" and not (arguments[2] or 0) & WRITES:
        return
    # shutil.rmtree names what it deletes below an open folder.
    below = arguments[1] if event in ("os.remove", "os.rmdir") else -1
    _happens(event, _named(below) / arguments[0] if below >= 0 else Path(arguments[0]))


def _named(file: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{file}"))


def _synced(fsync: Any, file: int) -> None:
    _happens("fsync", _named(file))
    fsync(file)


def _happens(event: str, path: Path) -> None:
    if "checkpoints" not in path.parts or "RANK" not in os.environ:
        return
    done["events"] += 1
    writer = multiprocessing.current_process().daemon
    me = {"rank": int(os.environ["RANK"]), "writer": writer, "event": done["events"]}
    _note("events.txt", {**me, "what": event, "path": path.name})
    wanted = {"event": math.inf, **_wanted()}
    if me["event"] >= wanted["event"] and (me["rank"], me["writer"]) == (wanted["rank"], wanted["writer"]):
        _kill(f"{event} {path.name}")


def _stepped(step: Any, module: Any, batch: Any, number: int) -> None:
    after = _wanted().get("after")
    done["steps"] += 1
    if after is not None and done["steps"] == 1 and os.environ["RANK"] == "0":
        signal.signal(signal.SIGALRM, lambda *_: _kill("some time"))
        signal.setitimer(signal.ITIMER_REAL, after)
    step(module, batch, number)


def _wanted() -> dict[str, Any]:
    return dict(json.loads((log_dir() / "kill.json").read_text()))


def _kill(what: str) -> None:
    _note("kills.txt", what)
    os.killpg(0, signal.SIGKILL)


def _note(name: str, what: object) -> None:
    file = os.open(log_dir() / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (json.dumps(what) + "\n").encode())
    os.close(file)
