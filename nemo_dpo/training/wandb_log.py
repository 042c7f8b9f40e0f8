"""Weights & Biases: an account is asked for at the start, and no outage of it stops a run.

A server that cannot be reached at the start: the figures are kept on disk, to be sent by `wandb sync`. One that fails
later: wandb's own process keeps them and tries again, training does not wait. That process gone: a warning, once.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests  # wandb's own; it knows of proxies and certificates
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from nemo_dpo.config import ConfigError
from nemo_dpo.config.exp_manager import ExpManagerConfig
from nemo_dpo.one_line import one_line
from nemo_dpo.parallel.collective import on_rank_zero

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
# wandb's own default is to wait for a server for ever. A run that is asked to stop has this long less for its save.
FINISH_SECONDS = "30"
KEPT = "figures are kept in the log folder, `wandb sync` sends them later"


def check_wandb(cfg: ExpManagerConfig) -> None:
    """Log in now, rather than after the model is built; without a connection go on offline. On rank 0.

    A terminal is asked for the key.

    Raises:
        ConfigError: it is wanted online and there is no API key, or the server does not take it.
    """
    given = cfg.wandb_logger_kwargs or {}
    offline = given.get("offline") or {os.environ.get("WANDB_MODE"), given.get("mode")} & {"offline", "disabled"}
    if not cfg.create_wandb_logger or offline:
        return
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    try:
        wandb.login(verify=False)
        url = wandb.setup().settings.base_url
        if problem := _unreachable(url):
            os.environ["WANDB_MODE"] = "offline"  # which `wandb_options` reads
            logger.warning("Weights & Biases at %s cannot be reached (%s): %s", url, problem, KEPT)
        else:
            wandb.login(verify=True)
    except wandb.Error as error:
        raise ConfigError(
            f"exp_manager.create_wandb_logger=true: {one_line(error)} Or export WANDB_API_KEY, "
            "or WANDB_MODE=offline, or set exp_manager.create_wandb_logger=false"
        ) from error


def _unreachable(url: str) -> str:
    """Why the server does not answer, or ""."""
    try:
        status = requests.get(url, timeout=REACH_SECONDS).status_code
    except requests.RequestException as error:
        return type(error).__name__
    return f"HTTP status {status}" if status >= 500 else ""


def wandb_options(cfg: ExpManagerConfig, log_dir: Path) -> dict[str, Any]:
    """The arguments of Lightning's WandbLogger: a resumed run is the same run. Collective."""
    identity = {"id": on_rank_zero(lambda: _run_id(log_dir)), "resume": "allow"}
    mode = {"mode": "offline"} if os.environ.get("WANDB_MODE") == "offline" else {}
    return {**identity, **mode, **(cfg.wandb_logger_kwargs or {})}


def _run_id(log_dir: Path) -> str:
    path = log_dir / "wandb_run_id"
    if not path.exists():
        log_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


class GuardedWandb(Logger):
    """Hands figures on to W&B until that fails, which is said once; from then on it drops them."""

    def __init__(self, target: WandbLogger, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._target = _opened(target, options) if rank_zero_only.rank == 0 else target
        self._works = True

    @property
    def name(self) -> str | None:
        return self._target.name

    @property
    def version(self) -> str | None:
        return self._target.version

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The effective configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A failure is not the run's."""
        self._try(lambda: self._target.log_metrics(metrics, step))

    @rank_zero_only
    def close(self) -> None:
        """Send what is left, for WANDB_FINISH_TIMEOUT seconds at most."""
        self._try(self._target.experiment.finish)

    def _try(self, action: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            action()
        except (wandb.Error, OSError, MailboxClosedError, HandleAbandonedError) as error:
            self._works = False
            logger.warning("Weights & Biases has failed (%s): training goes on, metrics.jsonl has all figures", error)


def _opened(target: WandbLogger, options: Mapping[str, Any]) -> WandbLogger:
    """`target` with its run open, or if the server does not let it one that keeps its figures on disk."""
    try:
        target.experiment  # noqa: B018  opens it
    except wandb.Error as error:
        logger.warning("Weights & Biases: %s: %s", one_line(error), KEPT)
        target = WandbLogger(**{"save_dir": target.save_dir, **options, "mode": "offline"})
        target.experiment  # noqa: B018
    return target
