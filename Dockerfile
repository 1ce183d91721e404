# An image that trains, evaluates and exports, on NVIDIA GPUs or on TPUs:
#
#     docker build -t lazyattn .
#     docker build -t lazyattn --build-arg DEVICE=tpu .
#
# CUDA, cuDNN, NCCL and libtpu come as Python packages, so no vendor's image is needed; a GPU host
# needs its driver and the NVIDIA container toolkit.
FROM python:3.13-slim
ARG DEVICE=cuda

WORKDIR /lazyattn
# The packages first: they change less often than the code.
COPY requirements.txt ./
COPY requirements/ requirements/
RUN pip install --no-cache-dir -r requirements.txt -r requirements/${DEVICE}.txt gcsfs s3fs
COPY . .
RUN pip install --no-cache-dir --no-deps .

ENV PYTHONUNBUFFERED=1
# In this form the program gets SIGTERM itself, and no shell before it.
ENTRYPOINT ["lazyattn"]
