# Training in a container. The CUDA libraries come with torch's wheels; the host needs only its driver and the
# NVIDIA container toolkit.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make tmux \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --shell /bin/bash dev && install --directory --owner=dev /home/dev/mnist_cnn
USER dev
WORKDIR /home/dev/mnist_cnn
ENV PATH=/home/dev/venv/bin:$PATH PYTHONUNBUFFERED=1

# The dependencies before the code, so that a change of code rebuilds in seconds.
COPY --chown=dev pyproject.toml ./
RUN python -m venv /home/dev/venv \
    && mkdir mnist_cnn && touch mnist_cnn/__init__.py README.md LICENSE \
    && pip install --no-cache-dir --editable '.[augment,dev,report]'
COPY --chown=dev . .

EXPOSE 6006
CMD ["bash"]
