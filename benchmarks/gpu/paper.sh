#!/usr/bin/env bash
# The paper's models, teacher to ENGINE, then its tables 3 and 4 on the IWSLT14 test set (trained on another corpus: see
# paper.yaml). One call goes on for SECONDS_IN_ALL and then saves what it has; the same call again continues, as long as
# the directory of the run is still there. The exit code is 0 when both tables are written, 75 when there is more to do.
#
# For a machine with a GPU, nvcc and a Python with a CUDA torch and this package's dependencies; it needs no network.
#   ENGINE_FAST_DATA   the folder that holds deen_mix/
#   RUN      directory of the run; default runs/paper, of a dry run runs/paper_dry
#   PYTHON   default python3
#   WHEELS   a folder of wheels to install first; default none
#   OUT      where the log and the results are copied; default nowhere
#   SECONDS_IN_ALL   default 560, of a dry run 1800
#   BUILT=1  the extension is there already: do not build it again
#   DRY=1    try the script itself: configs/demo.yaml's corpus with few updates on the CPU, nothing is installed
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
run=${RUN:-$([ "${DRY:-0}" = 1 ] && echo runs/paper_dry || echo runs/paper)}
in_all=${SECONDS_IN_ALL:-$([ "${DRY:-0}" = 1 ] && echo 1800 || echo 560)}
work=build/gpu
mkdir -p "$work" "$run"
log=$work/paper.txt
: > "$log"
. benchmarks/gpu/install.sh

# shellcheck disable=SC2329  # the trap calls it
finish() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT/paper"
  cp "$log" "$OUT/"
  for table in table3 table4; do
    for file in results.json table.md figure.png; do
      [ ! -f "$run/$table/$file" ] || cp "$run/$table/$file" "$OUT/paper/$table-$file"
    done
  done
  tar -czf "$OUT/paper/metrics.tar.gz" -C "$run" --ignore-failed-read $(cd "$run" && ls -- */metrics.jsonl */stage.json 2> /dev/null) || true
}
trap finish EXIT

if [ "${DRY:-0}" = 1 ]; then
  base=configs/demo.yaml
  few=(--set teacher.max_updates=40 --set cmlm.max_updates=40 --set engine.max_updates=20 --set data.synthetic.num_train=2000)
  few+=(--set runtime.device=cpu)
else
  base=benchmarks/gpu/paper.yaml
  few=()
  install_here 300
fi

for table in table3 table4; do
  left=$((in_all - SECONDS - 20))
  if [ "$left" -lt 10 ]; then
    echo "no time left for $table: start the same call again" | tee -a "$log"
    exit 75
  fi
  rc=0
  # INT: the trainer saves and ends; the 15 s are for that.
  timeout --signal=INT --kill-after=15 "$left" "$python" -m engine_fast.cli.main run "configs/tables/$table.yaml" \
    --base "$base" --out "$run" "${few[@]}" 2>&1 | tee -a "$log" || rc=$?
  # 137 is also what the kernel leaves of a process that took too much memory
  if [ "$rc" = 137 ] && [ "$SECONDS" -lt $((in_all - 25)) ]; then
    echo "killed in $table, and not for its time" | tee -a "$log"
    exit 137
  fi
  case $rc in
    0) ;;
    124 | 130 | 137)
      echo "time is up in $table: start the same call again" | tee -a "$log"
      exit 75
      ;;
    *) exit "$rc" ;;
  esac
done
cat "$run"/table3/table.md "$run"/table4/table.md
