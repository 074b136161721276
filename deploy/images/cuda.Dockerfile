# Longreach on NVIDIA GPUs. From the repository's root:
#   docker build -f deploy/images/cuda.Dockerfile -t longreach:0.2.0-cuda .
# torch's wheels bring CUDA's libraries; the driver's come from the node, by NVIDIA's container toolkit.
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/longreach \
    && /opt/longreach/bin/pip install --constraint constraints.txt torch triton
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY deploy deploy
COPY engine engine
COPY kernels kernels
COPY lab lab
COPY loadtest loadtest
COPY plugins plugins
# With the transport that crosses hosts, for the CUDA of torch's wheels.
RUN /opt/longreach/bin/pip install --constraint constraints.txt . nixl-cu13==1.5.1

FROM python:3.11.14-slim-bookworm
# Triton compiles what launches its kernels when they are first used, and wants a C compiler for it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/longreach /opt/longreach
ENV PATH=/opt/longreach/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Of a login shell, in which an operator may start Ray, /etc/profile sets the path anew.
RUN groupadd --gid 1000 longreach \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp longreach \
    && echo "PATH=$PATH" > /etc/profile.d/longreach.sh
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["longreach"]
CMD ["--help"]
