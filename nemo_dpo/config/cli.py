"""The command line as users of hydra_runner know it: a few flags, and overrides."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nemo_dpo.config.describe import describe
from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.load import to_yaml
from nemo_dpo.config.schema import Config

_FLAGS = {
    "--config-path": "config_dir",
    "-cp": "config_dir",
    "--config-dir": "config_dir",
    "-cd": "config_dir",
    "--config-name": "config_name",
    "-cn": "config_name",
    "--cfg": "cfg",
    "-c": "cfg",
}

USAGE = """usage: {script} [--config-path FOLDER] [--config-name NAME] [--cfg job] [--help] [key=value ...]

  --config-path, -cp FOLDER   folder of the yaml; relative to the current folder, or else to the script's
  --config-dir, -cd FOLDER    the same
  --config-name, -cn NAME     name of the yaml in it, with or without .yaml
  --cfg, -c job               print the effective configuration and exit
  --help, -h                  print this and exit
  key=value                   set a key of the list below; +key= and ++key= mean the same

"""


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for."""

    config_dir: Path
    config_name: str
    overrides: tuple[str, ...]
    show_config: bool = False


def parse_cli(
    argv: Sequence[str], default_dir: Path, default_name: str, script: str = "train_gpt_dpo.py"
) -> CommandLine:
    """Read ``argv`` (without the program's name). ``--help`` prints and exits; a flag not known is a ConfigError."""
    values = {"config_dir": "", "config_name": default_name, "cfg": ""}
    overrides = []
    rest = iter(argv)
    for item in rest:
        flag, has_value, value = item.partition("=")
        if flag in ("--help", "-h"):
            _print_and_exit(USAGE.format(script=Path(script).name) + describe())
        elif flag in _FLAGS:
            values[_FLAGS[flag]] = value if has_value else _next(rest, flag)
        elif item.startswith("-"):
            raise ConfigError(f"{item} is not an option here; there are {', '.join(_FLAGS)}, --help and key=value")
        elif not has_value and not item.startswith("~"):
            raise ConfigError(f"{item!r} is neither an option nor key=value; write {item}=<value>")
        else:
            overrides.append(item)
    if values["cfg"] not in ("", "job"):
        raise ConfigError(f"--cfg={values['cfg']} must be job")
    config_dir = _folder(values["config_dir"], Path(script).parent) if values["config_dir"] else default_dir
    name = values["config_name"].removesuffix(".yaml")
    return CommandLine(config_dir, name, tuple(overrides), show_config=bool(values["cfg"]))


def show_config(cfg: Config) -> NoReturn:
    """``--cfg job``: print the effective configuration and exit."""
    _print_and_exit(to_yaml(cfg))


def _next(rest: Iterator[str], flag: str) -> str:
    value = next(rest, "")
    if not value:
        raise ConfigError(f"{flag} needs a value, as in {flag} <value>")
    return value


def _folder(given: str, script_dir: Path) -> Path:
    here = Path(given)
    return here if here.is_absolute() or here.is_dir() else script_dir / given


def _print_and_exit(text: str) -> NoReturn:
    sys.stdout.write(text)
    raise SystemExit(0)
