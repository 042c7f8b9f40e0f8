"""Configuration: schema, loading, checks. Needs hydra and omegaconf only, so that a wrong key is refused at once."""

from nemo_dpo.config.checks import check, check_folders, check_layout, check_model, layout_notice
from nemo_dpo.config.cli import CommandLine, parse_cli, show_config
from nemo_dpo.config.data_sources import Source, data_sources
from nemo_dpo.config.describe import describe
from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.load import load_config, to_yaml, with_cached_reference
from nemo_dpo.config.schema import Config

__all__ = [
    "CommandLine",
    "Config",
    "ConfigError",
    "Source",
    "check",
    "check_folders",
    "check_layout",
    "check_model",
    "data_sources",
    "describe",
    "layout_notice",
    "load_config",
    "parse_cli",
    "show_config",
    "to_yaml",
    "with_cached_reference",
]
