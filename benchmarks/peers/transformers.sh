#!/usr/bin/env bash
# Installs the peer "transformers" into its own virtual environment. Usage: transformers.sh [FOLDER, default .peers]
set -euo pipefail
target=${1:-.peers}/transformers
python3 -m venv "$target"
# accelerate and gguf: transformers reads a GGUF file only when both are there.
"$target/bin/pip" install "torch>=2.13,<2.14" "transformers>=5.17,<6" accelerate gguf safetensors
"$target/bin/python" -c "import torch, transformers; print('transformers', transformers.__version__, 'torch', torch.__version__)"
