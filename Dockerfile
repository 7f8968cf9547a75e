# Trains on a CPU, or on an NVIDIA GPU:
#
#     docker build -t jaxllm .
#     docker run -v jaxllm-runs:/runs jaxllm
#
#     docker build -t jaxllm:cuda13 --build-arg EXTRAS=cuda13 .
#     docker run --gpus all -v jaxllm-runs:/runs jaxllm:cuda13 python train.py --preset customllm-1b --data DATA
#
# CUDA and cuDNN come from the packages of the extra; the host needs NVIDIA's driver and its container toolkit alone.
FROM python:3.12-slim

# extras of pyproject.toml, separated by commas: none for a CPU
ARG EXTRAS=""

RUN useradd --create-home --uid 1000 jaxllm && install -d -o jaxllm /runs

WORKDIR /app
COPY . .
RUN pip install --no-cache-dir -e ".${EXTRAS:+[$EXTRAS]}" -c constraints.txt && ln -s /runs runs

# runs, and beside them what a start may reuse: tokenizers and compiled programs
ENV JAXLLM_CACHE_DIR=/runs/.cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /runs
USER jaxllm
CMD ["python", "train.py"]
