# The GPU environment of docs/cluster.md as an image. No image has been built yet; docs/cluster.md says what has run.
#   docker build -t megatron-espo .
# NVIDIA Apex is optional and absent: build it from source in an image that starts FROM this one.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Python 3.12. python3-dev and g++: source distributions and Triton's launchers. The ibverbs packages and librdmacm1: InfiniBand.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ git ibverbs-providers libibverbs1 librdmacm1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home espo \
    && install --directory --owner=espo --group=espo /opt/espo
USER espo
WORKDIR /opt/espo
ENV PATH=/opt/espo/venv/bin:$PATH PIP_NO_CACHE_DIR=1

COPY --chown=espo requirements requirements
RUN python3 -m venv venv \
    && pip install --no-deps --require-hashes -r requirements/gpu-py312.txt
RUN NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install \
    --no-deps --no-build-isolation --require-hashes -r requirements/transformer-engine-torch-py312.txt

COPY --chown=espo setup.py pyproject.toml README.md LICENSE ./
COPY --chown=espo megatron_espo megatron_espo
COPY --chown=espo examples examples
COPY --chown=espo tools tools
RUN pip install --no-deps --no-build-isolation --editable .
