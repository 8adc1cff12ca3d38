#!/usr/bin/env bash
# Runs the kit on a machine without a network, from the root of a checkout: bash benchmarks/gpu/run.sh [arguments of kit.py]
# Wheels of what the machine lacks lie in .whl/. The JSON and the log go to $OUT, or to gpu-kit/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT="${OUT:-$PWD/gpu-kit}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$OUT"
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 1
fi
# the package asks for its own version, which a checkout that is not installed does not have
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' src/tadistill/__init__.py)
mkdir -p "$site/tadistill-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: tadistill\nVersion: %s\n' "$version" >"$site/tadistill-$version.dist-info/METADATA"
export PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import httpx2, nltk, pydantic, rouge_score' || { echo "packages are missing; see benchmarks/gpu/README.md"; exit 1; }
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 benchmarks/gpu/kit.py --out "$OUT" "$@" 2>&1 | tee "$OUT/log"
