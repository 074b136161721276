# Longreach on CPUs. From the repository's root:
#   docker build -f deploy/images/cpu.Dockerfile -t longreach:0.2.0-cpu .
# TORCH_INDEX: an index with torch's CPU wheels, which are a tenth of the default ones.
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/longreach \
    && /opt/longreach/bin/pip install --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY deploy deploy
COPY engine engine
COPY kernels kernels
COPY lab lab
COPY loadtest loadtest
COPY plugins plugins
RUN /opt/longreach/bin/pip install --constraint constraints.txt .

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/longreach /opt/longreach
ENV PATH=/opt/longreach/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
# Of a login shell, in which an operator may start Ray, /etc/profile sets the path anew.
RUN groupadd --gid 1000 longreach \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp longreach \
    && echo "PATH=$PATH" > /etc/profile.d/longreach.sh
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["longreach"]
CMD ["--help"]
