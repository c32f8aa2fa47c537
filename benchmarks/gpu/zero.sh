#!/usr/bin/env bash
# ZeRO on one GPU, in one call of less than four minutes: stages, offload, the teacher's precision, compile and the
# heads' memory; tokens/s, and torch.cuda.max_memory_allocated against `engine-fast doctor --plan`. bench_zero.py says
# what is measured; the exit code is 1 if a case failed.
#
# For a machine with a GPU, nvcc and a Python with a CUDA torch and this package's dependencies; it needs no network.
#   PYTHON   default python3
#   WHEELS   a folder of wheels to install first; default none
#   OUT      where the log and the result are copied; default nowhere
#   SECONDS_IN_ALL   the whole ends by then; default 230, of a dry run 900
#   BUILT=1  the extension is there already (benchmarks/gpu/kernels.sh in the same checkout): do not build it again
#   DRY=1    try the script itself: small models on the CPU, nothing is installed or kept as a result
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-$([ "${DRY:-0}" = 1 ] && echo 900 || echo 230)}
work=build/gpu
mkdir -p "$work"
log=$work/zero.txt
: > "$log"
. benchmarks/gpu/install.sh

# shellcheck disable=SC2329  # the trap calls it
finish() {
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT/results"
    cp "$log" "$OUT/"
    find benchmarks/results/gpu "$work" -maxdepth 1 -name 'zero*.json' -newer "$work/zero-started" \
      -exec cp {} "$OUT/results/" \; 2> /dev/null || true
  fi
}
touch "$work/zero-started"
trap finish EXIT

if [ "${DRY:-0}" = 1 ]; then
  arguments=(--quick --device cpu)
else
  install_here 150
  arguments=(--device cuda)
fi
left=$((in_all - SECONDS - 15))
if [ "$left" -lt 10 ]; then
  echo "no time left to measure: $SECONDS of $in_all s went into the build" | tee -a "$log"
  exit 1
fi
rc=0
timeout --kill-after=5 "$((left + 10))" "$python" -m benchmarks.bench_zero "${arguments[@]}" --seconds "$left" 2>&1 |
  tee -a "$log" || rc=$?
exit "$rc"
