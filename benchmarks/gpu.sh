#!/usr/bin/env bash
# The gpu-marked tests and the tables, on a machine with a CUDA device. Results and logs go to $OUT (default benchmarks/results).
# usage: benchmarks/gpu.sh tests | kernels | training ROW... | trainer ROW... | lengths ARM,... WORKLOAD...      wheels in .whl, where there are any, are installed first
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
if [ -d .whl ] && [ ! -d build/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target build/site .whl/*.whl || exit 1
fi
[ -d build/site ] && export PYTHONPATH=$PWD/build/site
export PYTHONPATH=$PWD:${PYTHONPATH:-} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True
what=$1
shift
case $what in
  tests) timeout 400 python3 -m pytest -q -m gpu -p no:cacheprovider ${@:-$(grep -rl --include='test_*.py' 'mark.gpu' tests)} 2>&1 | tee "$OUT/tests.log" | tail -60 ;;
  kernels) timeout 200 python3 benchmarks/bench_kernels.py --out "$OUT/kernels.csv" "$@" 2>&1 | tee "$OUT/kernels.log" | tail -90 ;;
  training) timeout 560 python3 benchmarks/bench_training.py "$@" --out "$OUT/training.csv" 2>&1 | tee "$OUT/training.log" | tail -120 ;;
  trainer) timeout 560 python3 benchmarks/bench_trainer.py "$@" --out "$OUT/trainer.csv" 2>&1 | tee "$OUT/trainer.log" | grep -v Warning | tail -60 ;;
  lengths) timeout 560 python3 benchmarks/bench_lengths.py "$@" --out "$OUT/lengths.json" 2>&1 | tee -a "$OUT/lengths.log" | grep -v Warning | tail -40 ;;
esac
