"""Converters between Hugging Face folders, GGUF files and `.nemo` archives.

`hf_to_nemo`, `nemo_to_hf` and `gguf_to_hf` are the library's functions; they load torch when called, not before.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def hf_to_nemo(
    source: Path,
    output: Path,
    *,
    precision: str | None = None,
    hparams_file: Path | None = None,
    overwrite: bool = False,
    families: Collection[str] = (),
    verify: bool = True,
) -> None:
    """Convert a Hugging Face folder to the `.nemo` archive `output`; see `convert.run.hf_to_nemo`."""
    from nemo_dpo.convert import run

    run.hf_to_nemo(
        source,
        output,
        precision=precision,
        hparams_file=hparams_file,
        overwrite=overwrite,
        families=families,
        verify=verify,
    )


def nemo_to_hf(
    source: Path,
    output: Path,
    *,
    precision: str | None = None,
    overwrite: bool = False,
    families: Collection[str] = (),
    verify: bool = True,
) -> None:
    """Convert a `.nemo` (archive or folder) to the Hugging Face folder `output`; see `convert.run.nemo_to_hf`."""
    from nemo_dpo.convert import run

    run.nemo_to_hf(source, output, precision=precision, overwrite=overwrite, families=families, verify=verify)


def gguf_to_hf(
    source: Path, output: Path, *, precision: str = "32", overwrite: bool = False, verify: bool = True
) -> None:
    """Convert a Llama-family GGUF file to the Hugging Face folder `output`; see `convert.gguf.gguf_to_hf`."""
    from nemo_dpo.convert import gguf

    gguf.gguf_to_hf(source, output, precision=precision, overwrite=overwrite, verify=verify)
