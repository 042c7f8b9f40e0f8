"""Any older `.nemo` → one that training and the other converters read."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_dpo.checkpoint import archive
from nemo_dpo.convert.compare import check_written
from nemo_dpo.convert.old_nemo import modernised, write_rest
from nemo_dpo.convert.run import temporary_folder, write_nemo

logger = logging.getLogger(__name__)


def nemo_to_mcore(source: Path, output: Path, *, overwrite: bool = False, verify: bool = True) -> None:
    """Convert an older `.nemo` to megatron-core's names in a `torch_dist` checkpoint.

    Args:
        source: an archive or an extracted folder: NeMo 1.x's GPT or megatron-core's, in one file or one for every
            tensor- and pipeline-parallel rank; or a distributed checkpoint of kind `zarr`.
        output: the archive; appears only when it is complete. Dtypes stay as they are.
        overwrite: replace an existing `output`.
        verify: read the archive again and compare every parameter with `source` before it gets its name.

    Raises:
        ArchitectureError, CheckpointError, TokenizerError: anything missing, damaged, unsupported or unmatched.
    """
    archive.check_target(output, overwrite=overwrite)
    with (
        temporary_folder(output) as target,
        archive.open_folder(source, target.parent, archive.check_any_layout) as folder,
    ):
        config, chunks = modernised(folder)
        write_rest(folder, config, target)

        def check(written: Path) -> None:
            check_written(written, modernised(folder)[1], source)

        write_nemo(target, chunks, output, overwrite=overwrite, check=check if verify else None)
    logger.info("wrote %s", output)
