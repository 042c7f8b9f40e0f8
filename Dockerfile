# The trainer in a container; docs/containers.md has the commands for docker, buildah, enroot and Apptainer.
#   docker build -t nemo_dpo .                                              NVIDIA's PyTorch: torch, Transformer Engine, Apex
#   docker build -t nemo_dpo --build-arg BASE_IMAGE=python:3.11-slim .      plain Python: CPU, torch from pip
# No step needs a GPU, a password or a token.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE_IMAGE}

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# tini is process 1: it hands signals on and collects orphans. Its version is the distribution's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# Any user may run it; one that the image does not know needs a home, too (NeMo asks for it at its import).
RUN useradd --create-home --home-dir /srv/nemo --uid 10001 nemo && chmod 1777 /srv/nemo
ENV HOME=/srv/nemo

# A base image with torch keeps its own build; a plain one gets the tested version.
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3013
RUN python -c "import torch" 2>/dev/null || pip install --no-cache-dir "${TORCH}"

# Packages before code: a change of the code rebuilds one small layer. With Python 3.12 and later, too, the constraints
# choose the megatron-core that the tests ran with.
WORKDIR /opt/nemo_dpo
COPY setup.py constraints.txt LICENSE ./
COPY nemo_dpo/__init__.py nemo_dpo/
RUN touch README.md && pip install --no-cache-dir --constraint constraints.txt --editable '.[qlora,zarr]'
COPY . .

# What the image was built from; a run records it.
ARG REVISION=
ENV NEMO_DPO_REVISION=${REVISION}

USER 10001
WORKDIR /opt/nemo_dpo/examples/nlp/gpt
ENTRYPOINT ["tini", "--"]
CMD ["python", "train_gpt_dpo.py", "--help"]
