# syntax=docker/dockerfile:1
# One image for every node of a cluster, in two sizes: PyTorch for CPUs, and with CUDA's libraries.
#
#   docker build --target cpu -t registry.example.com/ray-ldm:0.1.0-cpu .
#   docker build --target gpu -t registry.example.com/ray-ldm:0.1.0-gpu .
#
# The versions are those of constraints.txt, which the tests run with. No weights are in it but the package's own small
# VAEs (ldm/assets); checkpoints come from a volume or a bucket. Give the base image with its digest in PYTHON_IMAGE.
# Written where no Docker was: it has never been built. tests/cluster checks what can be checked without.

ARG PYTHON_IMAGE=python:3.11-slim

# What is installed, without a layer of its own in the images.
FROM scratch AS source
COPY pyproject.toml constraints.txt README.md LICENSE /
COPY ldm /ldm
COPY pipelines /pipelines
COPY jobs /jobs

FROM ${PYTHON_IMAGE} AS base
# rsync: `ray up` copies files into containers with it. wget: KubeRay asks with it whether a node is well.
# procps: Ray's dashboard names processes with ps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps rsync wget \
    && rm -rf /var/lib/apt/lists/*
# Of number 1000, as the first user of cloud machines is: `ray up` mounts files that belong to that user.
RUN useradd --uid 1000 --user-group --create-home --shell /bin/bash ldm
# RAY_LOGGER_LEVEL: at `info` Ray writes the variables that a job brings, secrets too, into a log of each node.
# HOME must be among the image's variables: `ray up` looks for it there, and takes /root otherwise.
ENV HOME=/home/ldm \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    RAY_LOGGER_LEVEL=warning \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/ldm

# Everything goes into the interpreter's own packages and not into a virtual environment: KubeRay starts Ray in a login
# shell, whose PATH is that of /etc/profile, with /usr/local/bin and without any environment.

FROM base AS cpu
# Only these two from PyTorch's index, which has their builds without CUDA; what they need comes with the package.
RUN --mount=type=bind,from=source,source=constraints.txt,target=/constraints.txt \
    pip install -c /constraints.txt --no-deps --index-url https://download.pytorch.org/whl/cpu torch torchvision
RUN --mount=type=bind,from=source,target=/src,rw \
    pip install -c /src/constraints.txt '/src[text,lora]'
USER 1000:1000

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# PyTorch in a layer below, so that a change of the code does not move gigabytes again.
RUN --mount=type=bind,from=source,source=constraints.txt,target=/constraints.txt \
    pip install -c /constraints.txt torch torchvision
RUN --mount=type=bind,from=source,target=/src,rw \
    pip install -c /src/constraints.txt '/src[text,lora]'
USER 1000:1000
