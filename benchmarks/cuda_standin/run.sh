#!/usr/bin/env bash
# run.sh [--full] [--update]: builds the stand-in for CUDA and compares the figures of models with baseline.json.
# PYTHON is an interpreter with the CUDA build of torch; CUDA_HOME has the headers of CUDA 13.
set -euo pipefail
root=$(readlink -f "$(dirname "$0")/../..")
folder=${CUDA_STANDIN_BUILD:-$root/build/cuda_standin}
PYTHON=${PYTHON:-python}
export CUDA_HOME=${CUDA_HOME:-$("$PYTHON" -c 'import nvidia.cu13 as m; print(list(m.__path__)[0])')}
"$root/benchmarks/cuda_standin/build.sh" "$folder"
export OMP_NUM_THREADS=1 PYTHONPATH=$root
CUDA_STANDIN=$folder/libcuda.so.1 LD_PRELOAD=$folder/libcuda.so.1 LD_LIBRARY_PATH=$folder \
  exec "$PYTHON" -m benchmarks.cuda_standin.check "$@"
