# pipecat-qwen3 on a GPU: docker build -t pipecat-qwen3 . && docker run --gpus all -p 8880:8880 -v models:/models pipecat-qwen3
# The CUDA libraries and the kernels' compiler come with torch's wheel; the host needs a driver and nothing else.
FROM python:3.12-slim

# Triton, which the codec's kernels are written in, builds its launcher with a C compiler: whichever Debian has.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 speaker && mkdir /models && chown speaker /models
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY megakernel megakernel
COPY pipecat_qwen3 pipecat_qwen3
RUN pip install --no-cache-dir -c constraints.txt '.[server]'

# A number, so that an orchestrator can tell that it is not root.
USER 1000
ENV HF_HOME=/models PIPECAT_QWEN3_MODEL=Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice
VOLUME /models
EXPOSE 8880
STOPSIGNAL SIGTERM
# Healthy means warm; the first start downloads the model.
HEALTHCHECK --start-period=15m --interval=10s --timeout=3s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8880/ready', timeout=2)"]
# The key comes from the environment: docker run -e PIPECAT_QWEN3_API_KEY=...
CMD ["sh", "-c", "exec pipecat-qwen3 serve --host 0.0.0.0 --model \"$PIPECAT_QWEN3_MODEL\""]
