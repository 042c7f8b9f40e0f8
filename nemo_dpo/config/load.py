"""From a yaml file and command-line overrides to a :class:`Config`: composed by hydra, strictly checked, typed.

Hydra composes a plain tree; legacy keys are translated (:mod:`nemo_dpo.config.legacy`), and what is left is merged
over the structured schema here. So strictness does not depend on the user's ``defaults`` list, and one piece of code
judges a key whether it stands in a yaml or comes as ``key=``, ``+key=`` or ``++key=``.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_dpo.config import legacy
from nemo_dpo.config.errors import ConfigError
from nemo_dpo.config.keys import children, nearest, schema_keys
from nemo_dpo.config.peft import LoraTuningConfig
from nemo_dpo.config.schema import Config, OptimConfig, TrainerDpoConfig

logger = logging.getLogger(__name__)

SCHEMA_NAME = "gpt_dpo_schema"
"""Name under which a yaml's ``defaults`` list may ask for the schema's defaults."""

_HYDRA_KEY = "hydra's own key has no effect; exp_manager.explicit_log_dir is the run's folder"


def load_config(config_dir: Path | str, config_name: str, overrides: Sequence[str] = ()) -> Config:
    """Compose ``config_dir/config_name.yaml`` with ``overrides`` (hydra's syntax) into a resolved, typed tree.

    Raises :class:`ConfigError` for unknown or refused keys, all of them in one error, for values of a wrong type and
    for what hydra cannot read. Values are judged by :func:`nemo_dpo.config.check`.
    """
    with _as_config_error():
        user = _compose(Path(config_dir).resolve(), config_name.removesuffix(".yaml"), overrides)
        _refuse_missing(user)
        notices = _rename(user)
        tree = OmegaConf.merge(_defaults(), user)
        values = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    notices += [(item, _HYDRA_KEY) for item in overrides if _is_hydras(item)]
    known, more = _translate(values)
    cfg, switched_off = _without_idle_sequence_parallel(_typed(known))
    for line in legacy.grouped([*notices, *more, *switched_off, *_idle_keys(cfg)]):
        logger.info("%s", line)
    return cfg


def with_cached_reference(cfg: Config) -> Config:
    """``cfg`` with the log-probs of its kind of reference kept on disk."""
    kind, dpo = cfg.model.reference_kind, cfg.model.dpo
    if kind.startswith("cached:"):
        return cfg
    reference = replace(dpo.reference, kind=f"cached:{kind}")
    return replace(cfg, model=replace(cfg.model, dpo=replace(dpo, reference=reference)))


def to_yaml(cfg: Config) -> str:
    """The effective configuration, readable again by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _compose(config_dir: Path, config_name: str, overrides: Sequence[str]) -> DictConfig:
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)
    # A plain tree: over a typed node hydra would raise its own errors before legacy keys can be translated.
    ConfigStore.instance().store(name=SCHEMA_NAME, node=OmegaConf.to_container(OmegaConf.structured(Config)))
    if not config_dir.is_dir():
        raise ConfigError(f"--config-path={config_dir} is not a folder; give the folder that holds {config_name}.yaml")
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return compose(config_name, _forced(overrides, config_dir))


def _forced(overrides: Sequence[str], config_dir: Path) -> list[str]:
    """``overrides`` in hydra's ``++`` form, in which they may name any key; config groups and hydra's own keys stay.

    Which keys exist is decided afterwards, and for all forms alike.
    """
    forced = []
    for item in OverridesParser.create().parse_overrides(list(overrides)):
        line, key = str(item.input_line), item.key_or_group
        if item.is_delete():
            raise ConfigError(f"{line}: a key cannot be deleted; set the value you want, for example null")
        if item.is_sweep_override():
            raise ConfigError(
                f"{line} is a sweep, which is not offered; give one value, a list as [1,2], a text in quotes"
            )
        group = "/" in key or item.package is not None or (config_dir / key).is_dir()
        forced.append(line if group or _is_hydras(key) else "++" + line.lstrip("+"))
    return forced


def _is_hydras(override: str) -> bool:
    return override.lstrip("+").startswith(("hydra.", "hydra/"))


@contextmanager
def _as_config_error() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as ConfigError, with their first, telling lines."""
    try:
        yield
    except YAMLError as error:
        raise ConfigError(f"the yaml cannot be read: {error}") from error
    except OverrideParseException as error:
        hint = "a value with special characters needs quotes, as in \"key='a=b'\""
        raise ConfigError(f"{error.override}: {_first_line(error)}; {hint}") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ else ""
        raise ConfigError(f"{error}{cause}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _defaults() -> DictConfig:
    return OmegaConf.create(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(Config))))


def _refuse_missing(user: DictConfig) -> None:
    """A merge would silently take the default where the user wrote ``???``, "must be given"."""
    raw = cast(dict[str, Any], OmegaConf.to_container(user))
    if missing := [path for path, value in _leaves(raw) if value == "???"]:
        raise ConfigError(f"{', '.join(missing)}: ??? asks for a value; add {missing[0]}=<value>")


def _rename(user: DictConfig) -> list[tuple[str, str]]:
    """Move renamed keys to their new names, before interpolations are resolved."""
    notices = []
    for old, rule in legacy.RULES.items():
        if not isinstance(rule, legacy.Renamed) or OmegaConf.select(user, old) is None:
            continue
        OmegaConf.update(user, rule.to, OmegaConf.select(user, old), force_add=True)
        notices.append((old, f"is now called {rule.to}"))
    return notices


def _translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without legacy keys, and the notices about them; one error with all unknown and refused keys."""
    problems: list[str] = []
    notices: list[tuple[str, str]] = []
    known: dict[str, Any] = {}
    leaves = dict(_leaves(values))
    for path, value in leaves.items():
        key = schema_keys().get(path)
        rule_key, rule = legacy.rule_for(path)
        if key and key.section:
            problems.append(f"{path}={value!r}: {path} is a section; set its keys, {path}.<key>=<value>")
        elif key:
            known[path], notice = legacy.VALUES.get(path, {}).get(_hashable(value), (value, ""))
            notices += [(f"{path}={value}", notice)] if notice else []
        elif isinstance(rule, legacy.Refused) and _hashable(value) not in rule.allowed:
            problems.append(_refusal(path, value, rule))
        elif isinstance(rule, legacy.Mirror) and value not in (None, leaves.get(rule.of)):
            problems.append(f"{path}={value!r} differs from {rule.of}={leaves.get(rule.of)!r}; set {rule.of} alone")
        elif isinstance(rule, legacy.Mapped) and _hashable(value) not in rule.silent:
            notices.append((rule_key, rule.notice))
        elif rule is None:
            problems.append(_unknown(path))
    if problems:
        raise ConfigError("\n".join(problems))
    return known, notices


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full key, value) down to the schema's keys; below a key of the schema that is no section all is free."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        key = schema_keys().get(path)
        if isinstance(value, Mapping) and (key is None or key.section) and value:
            yield from _leaves(value, path + ".")
        elif not (key and key.section and value == {}):
            yield path, value


def _hashable(value: object) -> object:
    return value if isinstance(value, Hashable) else str(value)


def _refusal(path: str, value: object, rule: legacy.Refused) -> str:
    wanted = "null" if rule.allowed[-1] is None else str(rule.allowed[-1]).lower()
    return f"{path}={value!r} is refused: {rule.reason}. Leave it out, or set it to {wanted}"


def _unknown(path: str) -> str:
    if close := nearest(path):
        return f"unknown key {path}; did you mean {close}?"
    section = path.rpartition(".")[0]
    while section and not children(section):
        section = section.rpartition(".")[0]
    return f"unknown key {path}; keys of {section or 'the top level'} are {', '.join(children(section))}"


def _typed(known: Mapping[str, Any]) -> Config:
    """The dataclass tree with ``known`` values, each converted to its field's type."""
    tree = OmegaConf.structured(Config)
    _unlock(tree)
    for path, value in known.items():
        try:
            OmegaConf.update(tree, path, value, merge=False)
        except OmegaConfBaseException as error:
            expected = schema_keys()[path].type_name
            raise ConfigError(f"{path}={value!r} has the wrong type: expected {expected}") from error
    return cast(Config, OmegaConf.to_object(tree))


def _unlock(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes; values must still be set while the tree is built."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_interpolation(node, str(key)) and isinstance(node[key], DictConfig):
            _unlock(node[key])


def _without_idle_sequence_parallel(cfg: Config) -> tuple[Config, list[tuple[str, str]]]:
    if not cfg.model.sequence_parallel or cfg.model.tensor_model_parallel_size > 1:
        return cfg, []
    notice = "switched off, for it needs model.tensor_model_parallel_size of at least 2"
    return replace(cfg, model=replace(cfg.model, sequence_parallel=False)), [("model.sequence_parallel", notice)]


def _idle_keys(cfg: Config) -> Iterator[tuple[str, str]]:
    """What the values of other keys make useless."""
    limits = cfg.trainer.dpo
    if limits.on_nonfinite == "stop" and limits.max_consecutive_skips != TrainerDpoConfig().max_consecutive_skips:
        yield "trainer.dpo.max_consecutive_skips", "not used by trainer.dpo.on_nonfinite=stop"
    yield from _idle_optimizer_keys(cfg)
    yield from _idle_adapter_keys(cfg)


def _idle_optimizer_keys(cfg: Config) -> Iterator[tuple[str, str]]:
    """What the chosen optimizer and schedule do not use; configurations carry such keys along."""
    optim, sched, default = cfg.model.optim, cfg.model.optim.sched, OptimConfig()
    if optim.name == "sgd" and optim.betas != default.betas:
        yield "model.optim.betas", "not used by model.optim.name=sgd"
    if optim.name == "sgd" and optim.eps != default.eps:
        yield "model.optim.eps", "not used by model.optim.name=sgd"
    if sched.name != "CosineAnnealing" and sched.constant_steps:
        yield "model.optim.sched.constant_steps", f"not used by model.optim.sched.name={sched.name}"
    if sched.name == "constant" and sched.min_lr:
        yield "model.optim.sched.min_lr", "not used by model.optim.sched.name=constant"


def _idle_adapter_keys(cfg: Config) -> Iterator[tuple[str, str]]:
    """What no adapter, or one that is read from a file, does not use; NeMo's configurations carry such keys along."""
    peft, default = cfg.model.peft, LoraTuningConfig()
    idle, reason = [item.name for item in fields(LoraTuningConfig)], "model.peft.peft_scheme=none"
    if peft.lora:
        idle = ["column_init_method", "row_init_method"] if peft.restore_from_path else []
        reason = f"model.peft.restore_from_path={peft.restore_from_path}"
    for name in idle:
        if getattr(peft.lora_tuning, name) not in (getattr(default, name), getattr(default.of_new, name)):
            yield f"model.peft.lora_tuning.{name}", f"not used by {reason}"
