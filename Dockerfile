# Elbow in a container.
#   docker build -t elbow .                     ONNX Runtime on the CPU, no torch: the default target, `cpu`
#   docker build -t elbow:gpu --target gpu .    TorchScript on CUDA
#   docker run -p 8000:8000 --read-only --cap-drop ALL elbow
# The shipped models lie in /models; mount a folder of <name>/<version>/ there to serve others. docs/deploy.md has the rest.
ARG PYTHON_IMAGE=python:3.11-slim

# What both targets share: the core dependencies in a virtual environment that has no pip of its own. Bytecode is compiled
# here, once, because a read-only root cannot keep what Python would compile at every start.
FROM ${PYTHON_IMAGE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/build/constraints.txt PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv --without-pip /opt/venv && \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > core.txt
RUN --mount=type=cache,target=/root/.cache/pip python3 -m pip --python /opt/venv/bin/python install -r core.txt
COPY deploy/docker/slim.py ./
RUN python3 slim.py /opt/venv

FROM packages AS service
COPY README.md LICENSE ./
COPY models models
COPY service service
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps . && \
    python3 -m compileall -q -x /testing/_internal/ --invalidation-mode unchecked-hash /opt/venv/lib

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    ELBOW_HOST=0.0.0.0 \
    ELBOW_PORT=8000 \
    ELBOW_REPOSITORY=/models
COPY checkpoints /models
COPY deploy/docker/health.py /opt/health.py
WORKDIR /tmp
# Numbers, so that Kubernetes' runAsNonRoot can tell; the user owns no file of the image.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "/opt/health.py"]
# No shell in between: SIGTERM reaches the server, which drains.
ENTRYPOINT ["elbow-serve"]
CMD ["run"]

# torch comes from the index of CUDA builds, in the version that constraints.txt pins. It brings its own CUDA libraries: the
# host needs the driver and NVIDIA's container toolkit only.
FROM packages AS gpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN --mount=type=cache,target=/root/.cache/pip python3 -m pip --python /opt/venv/bin/python install --index-url ${TORCH_INDEX} torch
COPY README.md LICENSE ./
COPY models models
COPY service service
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps . && \
    python3 -m compileall -q -x /testing/_internal/ --invalidation-mode unchecked-hash /opt/venv/lib

FROM base AS gpu
# without a GPU: -e ELBOW_DEVICE=cpu
ENV ELBOW_ENGINE=torchscript \
    ELBOW_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-packages /opt/venv /opt/venv

FROM base AS cpu
COPY --from=service /opt/venv /opt/venv
