#!/usr/bin/env bash
# The gpu-marked tests and the tables, on a machine with a CUDA device. Results and logs go to $OUT (default benchmarks/results).
# usage: benchmarks/gpu.sh tests [FILE...] | kernels | training ROW... | table | memory | checkpointing | first |
#   trainer ROW... | lengths ARM,... WORKLOAD... | NAME ...
# The words without rows are tables of docs/performance.md: all arms; nbkit within limits; beside transformers' own
# checkpointing; the first step of a process. NAME runs benchmarks/bench_NAME.py. Wheels in .whl, where there are any, are
# installed first. A file .commit with the commit's name counts where the machine's own git is not at it; so does --commit NAME.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
if [ -d .whl ] && [ ! -d build/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target build/site .whl/*.whl || exit 1
fi
[ -d build/site ] && export PYTHONPATH=$PWD/build/site
export PYTHONPATH=$PWD:${PYTHONPATH:-} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True
what=$1
shift
commit=()
[ -s .commit ] && [[ " $* " != *" --commit "* ]] && commit=(--commit "$(head -c 40 .commit | tr -d '[:space:]')")
quiet='FutureWarning|UserWarning|DeprecationWarning|warnings\.warn'
run() { # SECONDS LINES MODULE ARGUMENT...: all to a log, the last lines here; ended early enough to write what there is
  local seconds=$1 lines=$2 module=$3
  shift 3
  timeout -k 15 "$seconds" python3 -W ignore "benchmarks/$module.py" "$@" "${commit[@]}" 2>&1 | tee -a "$OUT/$what.log" | grep -vE "$quiet" | tail -"$lines"
}
table=(8b:nf4:2x2048 8b:nf4:1x512 8b:nf4:1x8192 8b:nf4:1x32768:r32 1b:nf4:2x512 1b:bf16:2x512 8b:bf16:2x2048)
memory=(8b:nf4:2x2048:within6.8 8b:nf4:2x2048:save 8b:nf4:1x512:within8.0 8b:nf4:1x32768:r32:within14.4 8b:nf4:1x32768:r32:within8.0
  8b:nf4:1x131072:r32:cap16:once 8b:nf4:1x262144:r32:cap24:once)
first=(8b:nf4:2x2048:once 1b:bf16:2x512:once)
case $what in
  tests) run 400 80 gpu_tests "$@" --out "$OUT" ;;
  kernels) run 150 110 bench_kernels --out "$OUT/kernels.csv" "$@" ;;
  training) run 570 120 bench_training "$@" --out "$OUT/training.csv" ;;
  table) run 575 120 bench_training "${table[@]}" --budget 150 --total 555 "$@" --out "$OUT/training.csv" ;;
  memory) run 575 80 bench_training "${memory[@]}" --arms nbkit --optimizer adamw8bit --budget 300 --total 555 "$@" --out "$OUT/training.csv" ;;
  checkpointing) run 300 60 bench_training 8b:nf4:2x2048:save --arms stock,liger,nbkit "$@" --out "$OUT/training.csv" ;;
  first) run 300 60 bench_training "${first[@]}" --arms nbkit,stock,liger,unsloth "$@" --out "$OUT/training.csv" ;;
  lengths) run 570 60 bench_lengths "$@" --out "$OUT/lengths.csv" ;;
  *) run 570 80 "bench_$what" "$@" --out "$OUT/$what.csv" ;;
esac
