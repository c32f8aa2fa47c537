#!/usr/bin/env bash
# Translation on one GPU, in one call of less than ten minutes: a sentence alone and in batches, student against teacher,
# and against CTranslate2 and transformers where they are installed and run there. bench_translate.py says what is
# measured; before it come the tests of recorded graphs, which meet real ones only here. Parts that are finished are kept
# in KEEP; the same call again takes them from there and goes on. The exit code is 0 when the tests pass, all is measured
# and no floor is missed, 75 when time was up first.
#
# For a machine with a GPU, nvcc and a Python with a CUDA torch, pytest and this package's dependencies; no network.
#   RUN      a finished run directory, for the part with trained models; default none
#   KEEP     default build/gpu/translate
#   PYTHON   default python3
#   WHEELS   a folder of wheels to install first (ctranslate2's, for example); default none
#   OUT      where the log and the result are copied; default nowhere
#   SECONDS_IN_ALL   the whole ends by then; default 560, of a dry run 900
#   BUILT=1  the extension is there already (benchmarks/gpu/kernels.sh in the same checkout): do not build it again
#   DRY=1    try the script itself: tiny models on the CPU, nothing is installed or kept as a result
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-$([ "${DRY:-0}" = 1 ] && echo 900 || echo 560)}
work=build/gpu
keep=${KEEP:-$work/translate}
mkdir -p "$work" "$keep"
log=$work/translate.txt
: > "$log"
. benchmarks/gpu/install.sh

# shellcheck disable=SC2329  # the trap calls it
finish() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT/results"
  cp "$log" "$OUT/"
  find benchmarks/results/gpu "$keep" -maxdepth 1 -name 'translate.*' -newer "$work/translate-started" \
    -exec cp {} "$OUT/results/" \; 2> /dev/null || true
  cp "$keep"/*.json "$OUT/results/" 2> /dev/null || true
}
touch "$work/translate-started"
trap finish EXIT

arguments=()
if [ "${DRY:-0}" = 1 ]; then
  arguments+=(--smoke --threads 1)
else
  install_here 240
  arguments+=(--device cuda --keep "$keep")
  [ -z "${RUN:-}" ] || arguments+=(--run "$RUN")
fi
tests=0
timeout --kill-after=5 90 "$python" -m pytest -q tests/models/test_graphs.py 2>&1 | tee -a "$log" || tests=1
left=$((in_all - SECONDS - 15))
if [ "$left" -lt 20 ]; then
  echo "no time left to measure: $SECONDS of $in_all s went into the build. Start the same call again with BUILT=1" | tee -a "$log"
  exit 75
fi
rc=0
timeout --kill-after=5 "$left" "$python" -m benchmarks.bench_translate "${arguments[@]}" --seconds "$((left * 2 / 3))" 2>&1 |
  tee -a "$log" || rc=$?
if [ "$rc" = 124 ] || [ "$rc" = 137 ]; then
  echo "time is up: start the same call again, with BUILT=1" | tee -a "$log"
  exit 75
fi
[ "$rc" != 0 ] || rc=$tests
exit "$rc"
