# shellcheck shell=bash
# For the scripts beside it, which set `python`, `work` and `log` and source it: not a command of its own.

# install_here LIMIT: WHEELS, then this checkout, compiled for the GPU, into the environment of $python, unless BUILT=1.
# Ends the script with 1 where the build fails or takes more than LIMIT seconds.
install_here() {
  nvidia-smi -L | tee -a "$log"
  if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl 2>&1 | tail -n 3 | tee -a "$log"
  fi
  [ "${BUILT:-0}" != 1 ] || return 0
  # One target only, unless told otherwise: the build takes much of the time.
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} ENGINE_FAST_CUDA=1
  timeout --kill-after=5 "$1" "$python" -m pip install --no-build-isolation --no-deps -e . > "$work/install.txt" 2>&1 || {
    tail -n 25 "$work/install.txt" | tee -a "$log"
    exit 1
  }
}
