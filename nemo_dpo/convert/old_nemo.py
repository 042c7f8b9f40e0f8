"""NeMo 1.x's `.nemo` → megatron-core's: one table of names, read by the converters' engine.

NeMo 1.x had a GPT of its own, with names such as `model.language_model.encoder.layers.0.self_attention.dense.weight`.
Its parameters are megatron-core's under other names: the rows of its fused query, key and value are those of head 0's
query, key and value, then of head 1's, and so on, which is megatron-core's order for as many query groups as heads (it
knew no others); its fused gate lies above its up projection. Names, layout and defaults are those of NeMo 1.22 by
reading (`language_model.py`, `attention.py`, `mlp.py`).

Norms get the names of Transformer Engine's layers (`linear_qkv.layer_norm_weight`), which is how checkpoints name them
whichever layers train them.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from nemo_dpo.checkpoint import CheckpointError, archive
from nemo_dpo.checkpoint.fingerprint import pieces
from nemo_dpo.checkpoint.stored import Respelled, Weights
from nemo_dpo.checkpoint.weights import ZARR, Chunk, kind_of, read_weights, write_weights
from nemo_dpo.convert import engine
from nemo_dpo.convert.families.common import (
    ATTENTION_NORM,
    FC1,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    POSITIONS,
    PROJ,
    QKV,
    WORDS,
)
from nemo_dpo.convert.family import ONE_RANK, Config, dims_of
from nemo_dpo.convert.legacy import LAYER, Join, LegacyWeights, rank_files
from nemo_dpo.convert.rules import Copy, Dims, GatedMlp, Param, Rule, Table
from nemo_dpo.model.architecture import Architecture, stated_vocab_size
from nemo_dpo.model.nemo_keys import completed
from nemo_dpo.tokenizer import load_tokenizer

OLD = "model.language_model."
NEW = "model."
NEW_LAYERS = "decoder.layers"


@dataclass(frozen=True)
class Line:
    """A parameter.

    Attributes:
        nemo: megatron-core's key below `model.`, without a layer number.
        old: NeMo 1.x's name below `model.language_model.`.
        dims: its shape, in names of `SourceDims.sizes`.
        join: how tensor-parallel ranks share it.
        when: the feature (see `features`) without which a model lacks it; empty: every model has it.
    """

    nemo: str
    old: str
    dims: str
    join: Join = Join.SAME
    when: str = ""


def _layer(nemo: str, old: str, dims: str, join: Join = Join.SAME, when: str = "") -> Line:
    """A parameter that every transformer layer has; `old` is its name within the layer."""
    return Line(nemo, f"encoder.layers.{LAYER}.{old}", dims, join, when)


LINES = (
    Line(WORDS, WORDS, "padded hidden", Join.ROWS),
    Line(POSITIONS, POSITIONS, "positions hidden", when="learned positions"),
    _layer(f"{ATTENTION_NORM}weight", "input_layernorm.weight", "hidden"),
    _layer(f"{ATTENTION_NORM}bias", "input_layernorm.bias", "hidden", when="norm bias"),
    _layer(f"{QKV}.weight", "self_attention.query_key_value.weight", "qkv hidden", Join.ROWS),
    _layer(f"{QKV}.bias", "self_attention.query_key_value.bias", "qkv", Join.ROWS, "qkv bias"),
    _layer(f"{PROJ}.weight", "self_attention.dense.weight", "hidden q", Join.COLUMNS),
    _layer(f"{PROJ}.bias", "self_attention.dense.bias", "hidden", when="bias"),
    _layer(f"{MLP_NORM}weight", "post_attention_layernorm.weight", "hidden"),
    _layer(f"{MLP_NORM}bias", "post_attention_layernorm.bias", "hidden", when="norm bias"),
    _layer(f"{FC1}.weight", "mlp.dense_h_to_4h.weight", "ffn hidden", Join.ROWS, "no gate"),
    _layer(f"{FC1}.bias", "mlp.dense_h_to_4h.bias", "ffn", Join.ROWS, "no gate, bias"),
    _layer(f"{FC1}.weight", "mlp.dense_h_to_4h.weight", "gated hidden", Join.HALVES, "fused gate"),
    _layer(f"{FC1}.bias", "mlp.dense_h_to_4h.bias", "gated", Join.HALVES, "fused gate, bias"),
    # Of activations without `fast-` the other projection is a tensor of its own, `dense_h_to_4h_2`.
    _layer(f"{FC1}.weight", "mlp.dense_h_to_4h.weight", "ffn hidden", Join.ROWS, "split gate"),
    _layer(f"{FC1}.bias", "mlp.dense_h_to_4h.bias", "ffn", Join.ROWS, "split gate, bias"),
    _layer(f"{FC2}.weight", "mlp.dense_4h_to_h.weight", "hidden ffn", Join.COLUMNS),
    _layer(f"{FC2}.bias", "mlp.dense_4h_to_h.bias", "hidden", when="bias"),
    Line(f"{FINAL_NORM}weight", "encoder.final_layernorm.weight", "hidden"),
    Line(f"{FINAL_NORM}bias", "encoder.final_layernorm.bias", "hidden", when="norm bias"),
    Line("output_layer.weight", "output_layer.weight", "padded hidden", Join.ROWS, "untied"),
)
# The last stage's copy of a tied embedding.
TIED_COPY = {OLD: "model.word_embeddings.weight", NEW: "model.output_layer.weight"}
DERIVED = (".inv_freq",)
# Keys of NeMo 1.x that change what a model computes, and the values at which it is what megatron-core computes.
REQUIRED = {"megatron_legacy": (None, False), "multi_query_attention": (None, False)}
SPLIT_ACTIVATIONS = ("swiglu", "geglu", "reglu")
GELU = ("gelu", "geglu")
FUSION, OLDER_FUSION = "bias_activation_fusion", "bias_gelu_fusion"  # the latter of the first versions


class SourceDims(Dims):
    """Sizes of an older checkpoint: also the rows that its embedding really has."""

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "gated": 2 * self.ffn, "padded": self.padded_vocab}


@contextlib.contextmanager
def open_modern(path: Path, scratch: Path | None = None, *, loadable: bool = False) -> Iterator[Path]:
    """As `archive.open_folder`, of any layout: what is older is rewritten beside it, and removed afterwards.

    With `loadable` that includes distributed checkpoints which `read_weights` reads and megatron-core does not.
    """
    with archive.open_folder(path, scratch, archive.check_any_layout) as folder:
        weights = folder / archive.MODEL_WEIGHTS
        if weights.is_dir() and not (loadable and kind_of(weights) == ZARR):
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="nemo_dpo_", dir=scratch) as rewritten:
            write_modern(folder, Path(rewritten))
            yield Path(rewritten)


def write_modern(folder: Path, target: Path) -> None:
    """Write the extracted archive `folder` of any layout into the folder `target`; see `modernised`."""
    config, chunks = modernised(folder)
    write_rest(folder, config, target)
    write_weights(target / archive.MODEL_WEIGHTS, chunks)


def modernised(folder: Path) -> tuple[Config, Iterator[Chunk]]:
    """model_config.yaml and weights of the extracted archive `folder` of any layout as megatron-core has them.

    Raises:
        CheckpointError, ArchitectureError, TokenizerError: anything missing, damaged, unsupported or unmatched, or
            nothing to do.
    """
    config = archive.read_model_config(folder)
    weights = folder / archive.MODEL_WEIGHTS
    if config.get("num_moe_experts"):
        raise CheckpointError(
            f"{folder}: holds a model with experts (num_moe_experts={config['num_moe_experts']}); of those only "
            "megatron-core's distributed checkpoints of kind torch_dist are read, which need no conversion"
        )
    if not weights.is_dir():
        return _converted(config, NEW if config.get("mcore_gpt") else OLD, folder)
    stored = read_weights(weights)
    if kind_of(weights) != ZARR and not isinstance(stored, Respelled):
        raise CheckpointError(f"{folder}: is a checkpoint of megatron-core already; there is nothing to convert")
    return config, _chunks(stored)


def write_rest(folder: Path, config: Config, target: Path) -> None:
    """All of `folder` but its weights into `target`, with `config` as model_config.yaml."""
    left = (archive.MODEL_CONFIG, archive.MODEL_WEIGHTS, *(f"{name}*" for name in archive.LEGACY_WEIGHTS))
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left), dirs_exist_ok=True)
    archive.write_model_config(config, target)


def modern_config(config: Config, vocab_size: int) -> Config:
    """The model_config.yaml of NeMo 1.x's GPT → megatron-core's that computes the same.

    Raises:
        CheckpointError, ArchitectureError: the model computes what megatron-core, or this package, does not.
    """
    heads = config.get("num_attention_heads")
    for key, values in {**REQUIRED, "num_query_groups": (None, heads)}.items():
        if config.get(key) not in values:
            raise CheckpointError(
                f"model_config.yaml: {key}={config[key]!r} cannot be converted, only {', '.join(map(str, values))}"
            )
    modern = {**config, **ONE_RANK, "mcore_gpt": True, "transformer_engine": True, "vocab_size": vocab_size}
    if FUSION not in modern and OLDER_FUSION in modern:
        modern[FUSION] = modern[OLDER_FUSION]
    modern.pop(OLDER_FUSION, None)
    activation = config.get("activation")
    modern["activation"] = f"fast-{activation}" if activation in SPLIT_ACTIVATIONS else activation
    arch = Architecture.parse(modern)
    full = completed(modern)
    if full[FUSION] and not (full["bias"] and full["activation"].endswith(GELU)):
        raise CheckpointError(
            f"model_config.yaml: activation={full['activation']} and bias={full['bias']} with {FUSION}, which is true "
            "where it is missing: NeMo 1.x builds no such model, or one whose MLP has no activation; if that is not "
            f"how it was trained, write {FUSION}: false"
        )
    stated = {"openai_gelu": arch.activation == "gelu_tanh", FUSION: False, "ffn_hidden_size": arch.ffn_hidden_size}
    return {**modern, **stated}


def features(config: Config, prefix: str) -> set[str]:
    """What the model of a completed model_config.yaml has, in the words of `Line.when`."""
    activation, gate = config["activation"], "no gate"
    if activation.endswith(SPLIT_ACTIVATIONS):
        gate = "split gate" if activation in SPLIT_ACTIVATIONS and prefix == OLD else "fused gate"
    present = {
        "learned positions": config["position_embedding_type"] == "learned_absolute",
        "norm bias": config["normalization"] != "rmsnorm",
        "qkv bias": config["bias"] or config["qkv_bias"],
        "bias": config["bias"],
        "untied": not config["share_embeddings_and_output_weights"],
        gate: True,
    }
    return {name for name, there in present.items() if there}


def table_of(config: Config, prefix: str) -> tuple[Table, dict[str, Join]]:
    """The parameter table of the model of a completed model_config.yaml, and how ranks share what is in it.

    Args:
        prefix: OLD for NeMo 1.x's names, NEW for megatron-core's, which files of that layout may also have.
    """
    has = features(config, prefix)
    rules: list[Rule] = []
    joins: dict[str, Join] = {}
    for line in (line for line in LINES if not line.when or has.issuperset(line.when.split(", "))):
        names = [_source(line, prefix)]
        if "split gate" in line.when:
            names.append(names[0].replace("dense_h_to_4h", "dense_h_to_4h_2"))
        rule = Copy if len(names) == 1 else GatedMlp
        rules.append(rule(line.nemo, tuple(Param(name, line.dims) for name in names)))
        joins |= dict.fromkeys(names, line.join)
    tied = {} if "untied" in has else {TIED_COPY[prefix]: _source(LINES[0], prefix)}
    return Table(tuple(rules), tied=tied, derived=DERIVED, config=archive.MODEL_CONFIG), {
        **joins,
        **dict.fromkeys(tied, Join.ROWS),
    }


def _source(line: Line, prefix: str) -> str:
    return prefix + (line.old if prefix == OLD else line.nemo.replace(NEW_LAYERS, f"{NEW_LAYERS}.{LAYER}"))


def _converted(config: Config, prefix: str, folder: Path) -> tuple[Config, Iterator[Chunk]]:
    """The new config and the new weights of files in the older layout."""
    vocab_size = stated_vocab_size(config) or load_tokenizer(config.get("tokenizer") or {}, folder).vocab_size
    modern = modern_config(config, vocab_size) if prefix == OLD else {**config, **ONE_RANK, "vocab_size": vocab_size}
    arch = Architecture.parse(modern)
    _check_interleaved(config, folder)
    table, joins = table_of(completed(config), prefix)
    weights = LegacyWeights(folder, joins)
    _check_ranks(config, weights, folder)
    embedding = _source(LINES[0], prefix)
    rows = weights[embedding].shape[0] if embedding in weights else 0
    if rows < vocab_size:
        raise CheckpointError(f"{folder}: the embedding has {rows} rows, fewer than the vocabulary of {vocab_size}")
    sizes = {field.name: getattr(dims_of(modern), field.name) for field in fields(Dims)}
    dims = SourceDims(**{**sizes, "padded_vocab": rows, "positions": arch.max_position_embeddings})
    return modern, engine.to_chunks(table, dims, weights, None)


def _check_interleaved(config: Config, folder: Path) -> None:
    """Refuse stages whose layers may be interleaved, as those of a virtual pipeline are.

    NeMo writes the chunks of a virtual pipeline into its training checkpoints alone, as dictionaries `model0`, `model1`
    … (`MegatronGPTModel.on_save_checkpoint`). A `.nemo` gets the model's own `state_dict` (`NLPSaveRestoreConnector`),
    in which a list of chunks has no parameters: so there is no such `.nemo` of NeMo's to tell the order from.
    """
    chunks, stages = config.get("virtual_pipeline_model_parallel_size"), len(rank_files(folder))
    if chunks not in (None, 1) and stages > 1:
        raise CheckpointError(
            f"{folder}: virtual_pipeline_model_parallel_size is {chunks!r:.80} with files of {stages} stages; in which "
            "order their layers are is unknown, for NeMo itself puts no weights of a virtual pipeline into a .nemo. "
            "Load the training checkpoint with NeMo and save it without; or, if each stage holds the layers that "
            "follow those of the stage before, write null in model_config.yaml"
        )


def _check_ranks(config: Config, weights: LegacyWeights, folder: Path) -> None:
    """Refuse files that are fewer than the config says; the last ranks may not have been copied."""
    found = {"tensor_model_parallel_size": weights.ranks, "pipeline_model_parallel_size": weights.stages}
    for key, count in found.items():
        stated = config.get(key)
        if isinstance(stated, int) and stated > count:
            raise CheckpointError(f"{folder}: {key} is {stated}, but there are files of {count}; copy the rest")
    if weights.num_layers != config.get("num_layers"):
        raise CheckpointError(
            f"{folder}: holds {weights.num_layers} layers, model_config.yaml says {config.get('num_layers')}"
        )


def _chunks(weights: Weights) -> Iterator[Chunk]:
    """The same weights, piece by piece."""
    for name, layer in pieces(weights):
        tensor = weights[name] if layer is None else weights.layer(name, layer)
        yield Chunk(name, tensor, layer, 0 if layer is None else weights.shape(name)[0])
