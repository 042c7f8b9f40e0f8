# The trainer in a container.
#   docker build -t nemo_dpo .                                              NVIDIA's PyTorch: torch, Transformer Engine, Apex
#   docker build -t nemo_dpo --build-arg BASE_IMAGE=python:3.11-slim .      plain Python: CPU, torch from pip
# No step needs a GPU, a password or a token.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE_IMAGE}

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# A base image with torch keeps its own build; a plain one gets the tested version.
ARG TORCH=torch==2.13.0
RUN python -c "import torch" 2>/dev/null || pip install --no-cache-dir "${TORCH}"

WORKDIR /opt/nemo_dpo
COPY . .
# With Python 3.12 and later, too, the constraints choose the megatron-core that the tests ran with.
RUN pip install --no-cache-dir --constraint constraints.txt .

RUN useradd --create-home --uid 10001 nemo
USER 10001
WORKDIR /opt/nemo_dpo/examples/nlp/gpt
CMD ["python", "train_gpt_dpo.py", "--help"]
