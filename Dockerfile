# Training in a container. The CUDA libraries come with torch's wheels; the host needs only its driver and the NVIDIA
# container toolkit. The target dev is all but the code, which the dev container mounts.
FROM python:3.11-slim-bookworm AS dev

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make tmux \
    && rm -rf /var/lib/apt/lists/*
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore MNIST_CNN_BIN=/usr/local/bin \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The dependencies before the code, so that a change of code rebuilds in seconds; as root and outside the home, all of
# which the dev container gives to another UID where the user's is another. setuptools first: pip builds with it what
# comes as source, instead of with one that it would fetch unpinned.
COPY requirements.lock /opt/
RUN sed '/^setuptools==/,/^ *#/!d' /opt/requirements.lock > /tmp/setuptools.lock \
    && pip install --require-hashes --requirement /tmp/setuptools.lock \
    && pip install --require-hashes --no-build-isolation --requirement /opt/requirements.lock \
    && rm /tmp/setuptools.lock

# logs is there for a volume to take its owner from.
RUN useradd --create-home --shell /bin/bash dev \
    && install --directory --owner=dev --group=dev /home/dev/mnist_cnn /home/dev/mnist_cnn/logs
USER dev
WORKDIR /home/dev/mnist_cnn
EXPOSE 6006
CMD ["bash"]

FROM dev
COPY --chown=dev:dev . .
RUN pip install --no-deps --no-build-isolation --editable .
