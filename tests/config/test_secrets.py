"""A secret in a configuration is refused by its key; its value is not repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_dpo.config import Config
from nemo_dpo.config.secrets import secrets

HIDDEN = "5ecre7" * 7


def with_options(**changes: Any) -> Config:
    return replace(Config(), exp_manager=replace(Config().exp_manager, **changes))


@pytest.mark.parametrize(
    ("logger", "options", "key"),
    [
        ("wandb", {"project": "x", "api_key": HIDDEN}, "api_key"),
        ("neptune", {"api_token": HIDDEN}, "api_token"),
        ("mlflow", {"tags": {"aws_access_key_id": HIDDEN}}, "tags.aws_access_key_id"),
        ("clearml", {"Password": HIDDEN}, "Password"),
    ],
)
def test_by_its_name(logger: str, options: dict[str, Any], key: str) -> None:
    (line,) = secrets(with_options(**{f"{logger}_logger_kwargs": options}))
    assert line.startswith(f"exp_manager.{logger}_logger_kwargs.{key} holds by its name a secret")
    assert HIDDEN not in line


@pytest.mark.parametrize(
    "value",
    [
        f"https://me:{HIDDEN}@mlflow.example",
        "h" + "f_" + HIDDEN,
        "gh" + "p_" + HIDDEN,
        "wandb_" + "v1_" + HIDDEN,
        "sk" + "-" + HIDDEN,
        "AKI" + "A" + "B2" * 8,
        "-----BEGIN " + "PRIVATE KEY-----",
    ],
)
def test_by_its_looks(value: str) -> None:
    (line,) = secrets(with_options(mlflow_logger_kwargs={"uris": [value]}))
    assert line.startswith("exp_manager.mlflow_logger_kwargs.uris.0 holds a ")
    assert value not in line


def test_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of W&B's older form is 40 hexadecimal digits, as many other things are."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    (line,) = secrets(with_options(wandb_logger_kwargs={"notes": "with 0123456789abcdef0123456789abcdef"}))
    assert "notes holds the value of WANDB_API_KEY" in line and "0123" not in line


def test_nothing_in_what_runs_usually_have() -> None:
    usual = {"project": "token-free", "name": "dpo", "max_tokens": "7", "tokenizer": "a", "uri": "http://host:5000/a@b"}
    usual |= {"save_dir": "/data/keys:2/run@3", "api_key": "", "file": "/data/sk-assessment-preferences-2026/a"}
    assert list(secrets(with_options(wandb_logger_kwargs=usual))) == []
