#!/usr/bin/env bash
# Installs the peer "llama_cpp" into its own virtual environment: built here, about ten minutes on two cores.
# Usage: llama_cpp.sh [FOLDER, default .peers]
set -euo pipefail
target=${1:-.peers}/llama_cpp
# What this processor has, but for the matrix unit: 0.3.36 built for AMX ends with a fault at its first ldtilecfg
# (ggml-org/llama.cpp issue 20824).
flags=-DGGML_NATIVE=OFF
for pair in avx512f:AVX512 avx512vbmi:AVX512_VBMI avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16 avx_vnni:AVX_VNNI; do
    if grep -qw "${pair%:*}" /proc/cpuinfo; then flags+=" -DGGML_${pair#*:}=ON"; fi
done
python3 -m venv "$target"
CMAKE_ARGS=$flags "$target/bin/pip" install --no-cache-dir --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
"$target/bin/python" -c "import llama_cpp; print('llama.cpp', llama_cpp.__version__)"
