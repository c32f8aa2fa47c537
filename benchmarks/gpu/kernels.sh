#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one call of less than ten minutes: builds the extension, checks the
# kernels with and without compute-sanitizer, runs the operators' tests, then the benchmarks. A step that fails does not
# stop the others; the summary stands last, and the exit code is 1 if a step failed.
#
# For a machine with a GPU, nvcc and a Python with a CUDA torch, pybind11 and pytest; it needs no network.
#   PYTHON   default python3
#   WHEELS   a folder of wheels to install first; default none
#   OUT      where the log, the summary and the results are copied; default nowhere
#   SECONDS_IN_ALL   steps are cut off so that the whole ends by then; default 570
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-570}
work=build/gpu
results=benchmarks/results/gpu
rm -rf "$work"
mkdir -p "$work" "$results"
log=$work/log.txt
summary=$work/summary.txt
: > "$log"
: > "$summary"
failed=0

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, or what is left; logs it, records how it went.
step() {
  local name=$1 limit=$2 left began=$SECONDS rc=0
  shift 2
  left=$((in_all - SECONDS))
  if [ "$left" -lt 5 ]; then
    printf '%-28s not run: no time left\n' "$name" >> "$summary"
    failed=1
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" > "$work/step.txt" 2>&1 || rc=$?
  cat "$work/step.txt" >> "$log"
  tail -n 25 "$work/step.txt"
  if [ "$rc" -eq 0 ]; then
    printf '%-28s ok, %d s\n' "$name" $((SECONDS - began)) >> "$summary"
    return 0
  fi
  [ "$rc" -ne 124 ] || printf '(cut off after %d s)\n' "$limit" | tee -a "$log"
  printf '%-28s FAILED with %d, %d s\n' "$name" "$rc" $((SECONDS - began)) >> "$summary"
  failed=1
  return 1
}

skip() {
  printf '%-28s skipped: %s\n' "$1" "$2" >> "$summary"
  failed=1
}

# shellcheck disable=SC2329  # the trap calls it
finish() {
  printf '\n== summary\n'
  cat "$summary"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT/results"
    cp "$log" "$summary" "$OUT/"
    find "$results" -name '*.json' -newer "$work/started" -exec cp {} "$OUT/results/" \;
  fi
}
touch "$work/started"
trap finish EXIT

# shellcheck disable=SC2329  # a child of step calls it
build_smoke() {  # for the GPU that is there
  local source pid pids=()
  local flags=(-O3 -std=c++20 --expt-relaxed-constexpr -arch=native -lineinfo -Icsrc -diag-suppress 1675)
  for source in csrc/cuda/*.cu tests/cuda_smoke/main.cu; do
    nvcc "${flags[@]}" -c "$source" -o "$work/$(basename "$source" .cu).o" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || return 1; done
  nvcc -arch=native "$work"/*.o -o "$work/cuda_smoke"
}
export -f build_smoke
export work python

# shellcheck disable=SC2329
machine() {
  nvidia-smi -L
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
}
export -f machine
step "the machine" 60 bash -euc machine || true

sanitize() {  # TOOL LIMIT
  if [ "$smoke" = no ]; then
    skip "cuda_smoke, $1" "it was not built"
  elif ! command -v compute-sanitizer > /dev/null; then
    skip "cuda_smoke, $1" "compute-sanitizer was not found"
  else
    step "cuda_smoke, $1" "$2" compute-sanitizer --tool "$1" --error-exitcode 3 "$work/cuda_smoke" --quick || true
  fi
}

smoke=no
step "build cuda_smoke" 180 bash -euc build_smoke && smoke=yes
if [ "$smoke" = yes ]; then
  step "cuda_smoke" 120 "$work/cuda_smoke" || true
else
  skip "cuda_smoke" "it was not built"
fi
sanitize memcheck 90

installed=no
if [ -n "${WHEELS:-}" ]; then
  step "install wheels" 60 "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || true
fi
# One target only, unless told otherwise: the build takes much of the time.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} ENGINE_FAST_CUDA=1
step "install engine_fast" 240 "$python" -m pip install -v --no-build-isolation --no-deps -e . && installed=yes
if [ "$installed" = yes ]; then
  step "tests/ops" 150 "$python" -m pytest tests/ops -q --maxfail=10 || true
  for module in bench_energy bench_soft_embed bench_linear; do
    step "$module" 120 "$python" -m "benchmarks.$module" --device cuda || true
  done
else
  skip "tests and benchmarks" "engine_fast was not installed"
fi

# Last, with the time that is left: the slowest and the least likely to find something.
sanitize racecheck 90
sanitize initcheck 90
exit "$failed"
