# flowtrain in a container: docs/install.md shows how it is built and run.
# BASE is an image with Python 3.11.4 or newer. One with PyTorch keeps it.
ARG BASE=python:3.12-slim
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY flowtrain flowtrain
COPY conf conf
ARG EXTRAS=tables,plots
ARG PIP_EXTRA_INDEX_URL=""
# this folder, which has no version to pin:
# hadolint ignore=DL3013
RUN python3 -m pip install ".[${EXTRAS}]"

# --user may give any number that has no name and no home
ENV HOME=/tmp USER=flowtrain
RUN useradd --create-home --uid 10001 flowtrain && install --directory --owner flowtrain /work
USER 10001
WORKDIR /work
ENTRYPOINT ["flowtrain"]
CMD ["--help"]
