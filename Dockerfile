# docker build -t blockdrop --build-arg CPU=1 .     (CPU=0, with CUDA's libraries, is for --gpus all)
# docker run --rm -it --network host blockdrop make demo
FROM python:3.12
ARG CPU=0
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
WORKDIR /blockdrop
COPY . .
RUN make setup CPU="$CPU"
CMD ["make", "help"]
