#!/usr/bin/env bash
# Installs the peer "openvino" into its own virtual environment, with what exports a model for it.
# Usage: openvino.sh [FOLDER, default .peers]
set -euo pipefail
target=${1:-.peers}/openvino
python3 -m venv "$target"
# torch, transformers and optimum only write the model out, once; the engine itself does not import them.
"$target/bin/pip" install "openvino-genai==2026.4.*" "optimum-intel[openvino]" "torch>=2.13,<2.14"
# It comes along, but not as the build that fits this torch, and then transformers does not import.
"$target/bin/pip" uninstall -y torchvision
"$target/bin/python" -c "import openvino_genai; print('openvino-genai', openvino_genai.__version__)"
