# A server of a checkpoint: docker build -f deploy/serve.Dockerfile -t retool-serve .
# On a GPU or a TPU add --build-arg EXTRAS=serve,sandbox,cuda or EXTRAS=serve,sandbox,tpu.
# Programs run on the sandbox servers in sandbox.urls (deploy/Dockerfile): this image has no sandbox and needs no
# privileges.
FROM python:3.11-slim-bookworm

ARG EXTRAS=serve,sandbox
COPY pyproject.toml README.md /src/
COPY configs /src/configs
COPY retool_jax /src/retool_jax
# Only the gRPC messages of google-jetstream are used; its dependencies would install TensorFlow.
RUN pip install --no-cache-dir "/src[${EXTRAS}]" grpcio protobuf \
    && pip install --no-cache-dir --no-deps google-jetstream==0.2.2

RUN useradd --uid 1000 --create-home serve
USER 1000

EXPOSE 8000 9000
HEALTHCHECK --start-period=15m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "retool_jax.serve"]
CMD ["config=serve", "init_from=/checkpoint", "serve.host=0.0.0.0", "serve.port=8000", "serve.grpc_port=9000", \
     "sandbox.backend=[remote]", "sandbox.urls=[http://retool-sandbox:8080]"]
