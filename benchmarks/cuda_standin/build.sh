#!/usr/bin/env bash
# build.sh FOLDER: compiles the stand-in for the CUDA runtime, driver and cuBLAS as FOLDER/libcuda.so.1.
# Needs g++ and the headers of CUDA 13 (CUDA_HOME, by default those of the nvidia wheels next to torch).
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$1"
{
  echo '#define STUB(name) __attribute__((visibility("default"))) int name() { return 0; }'
  sed 's/.*/STUB(&)/' "$here/stubs.txt" # what torch links against and these models do not call
} > "$1/stubs.c"
gcc -c -fPIC -fvisibility=hidden -o "$1/stubs.o" "$1/stubs.c"
g++ -std=c++17 -O1 -shared -fPIC -fvisibility=hidden -I"$CUDA_HOME/include" -Wl,-soname,libcuda.so.1 \
  -o "$1/libcuda.so.1" "$here"/{memory,streams,driver}.cpp "$1/stubs.o" -ldl
