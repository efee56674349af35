# The app with GPU management, as a user without rights. ./start_with_gpu_management.sh --docker and compose.yaml build and run it.
# Without a GPU, --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu saves several GB.
#
# For the real engine build it on the image of a Step-Audio-EditX checkout: docker build --tag step-audio-editx CHECKOUT, then
# --build-arg BASE_IMAGE=step-audio-editx. Its packages are used (those of /app/.venv, if it has one), and the others that this
# project needs are installed in /opt/venv.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

ARG TORCH_INDEX_URL=
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /app
COPY requirements.txt pyproject.toml ./
COPY scripts/python scripts/package_ranges scripts/install_in_image ./scripts/
RUN scripts/install_in_image /opt/venv
ENV PATH=/opt/venv/bin:/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 HEALTH_URL=http://127.0.0.1:7860/healthz \
    HF_HOME=/hub/huggingface MODELSCOPE_CACHE=/hub/modelscope GPU_TTS_VOICES_DIR=/voices

COPY *.py ./
COPY residency ./residency
RUN python -m compileall -q *.py residency \
    && useradd --uid 10001 --create-home app \
    && mkdir -p /snapshots /hub /voices \
    && chown app /snapshots \
    && chmod 1777 /hub /voices # for a volume, whoever the app runs as

USER app
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-Ic", "import os, ssl, urllib.request as r\nask, url = r.build_opener(r.ProxyHandler({}), r.HTTPSHandler(context=ssl._create_unverified_context())).open, os.environ['HEALTH_URL']\ntry: ask(url, timeout=2)\nexcept (OSError, ValueError): ask(url.replace('http:', 'https:'), timeout=2) # with --ssl-certfile"]
ENTRYPOINT ["python", "/app/app.py"]
CMD ["--enable-gpu-management", "--server-name", "0.0.0.0", "--server-port", "7860"]
