#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU, with one command, in at most nine minutes:
#
#     benchmarks/gpu_run.sh OUT_FOLDER [--rehearse]
#
# This builds csrc in place and runs every test that needs a GPU, the benchmarks at GPU sizes, the
# memory ceilings and a short bfloat16 training run. It writes results.json, report.md, a picture,
# forecast.txt and log.txt into OUT_FOLDER. It needs no network. A part that fails or runs out of time does not
# stop later parts; the last lines name the failures, and the exit code is 1.
# Each part saves its results in OUT_FOLDER/parts when it ends or is stopped, so a killed run still
# has a report: `python -m benchmarks.report OUT_FOLDER/parts/*.json --out OUT_FOLDER`.
#
# --rehearse runs the same parts on a CPU at the smallest sizes, in under a minute. Its parts share
# MFLOW_SECONDS and have no limits of their own, because a busy machine must not fail them.
# MFLOW_SECONDS is the time limit (540). MFLOW_COMMIT names the commit if git is not available.
set -uo pipefail

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

out='' rehearse=''
for argument in "$@"; do
  case "$argument" in
    --rehearse) rehearse=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out" && out=$(cd "$out" && pwd) && rm -rf "$out/parts" && mkdir "$out/parts" || exit 2
log=$out/log.txt
: >"$log" || exit 2
cd "$(dirname "$0")/.." || exit 2

seconds=${MFLOW_SECONDS:-540}
margin=30 # seconds kept for the report
started=$SECONDS
failed=()
# Compiled kernels are kept for the next run and shared by all processes of this one.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
export OMP_NUM_THREADS=1 # in each process

say() { echo "$*" | tee -a "$log"; }

left() { echo $((seconds - margin - (SECONDS - started))); }

# within LIMIT: print the seconds a part may take: LIMIT or the time left, whichever is less. In a
# rehearsal it is always the time left.
within() {
  local left
  left=$(left)
  if [ -z "$rehearse" ] && [ "$1" -lt "$left" ]; then echo "$1"; else echo "$left"; fi
}

# part NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, or for the time left if that is
# less. `shown`, if set, replaces the command in the log.
part() {
  local name=$1 limit begin=$SECONDS code
  limit=$(within "$2")
  [ "$name" = report ] && limit=$((limit + margin))
  shift 2
  if [ "$limit" -lt 5 ]; then
    say "== $name: no time left"
    failed+=("$name (no time left)")
    return
  fi
  say "== $name: ${shown:-$*} (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  say "== $name: exit code $code after $((SECONDS - begin)) s"
  [ "$code" -eq 124 ] || [ "$code" -eq 137 ] && failed+=("$name (stopped after $limit s)") && return
  [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
}

# together NAME LIMIT COMMANDS: run one command per line, all at once: most of their time goes to
# Triton, which compiles on one core. Each prints into its own file; the log gets them at the end.
together() {
  local folder=$out/parts/$1 shown
  shown="$(wc -l <<<"$3") at once, such as $(tail -n 1 <<<"$3")"
  mkdir -p "$folder"
  part "$1" "$2" bash -c 'all_at_once "$@"' _ "$folder" "$3"
  cat "$folder"/*.txt >>"$log" 2>/dev/null # no files if no time was left
}

all_at_once() { # FOLDER COMMANDS
  local running=() code=0 command one
  while read -r command; do
    bash -c "$command" >"$1/${#running[@]}.txt" 2>&1 &
    running+=($!)
  done <<<"$2"
  for one in "${running[@]}"; do wait "$one" || code=$?; done
  return "$code"
}
export -f all_at_once

# shards ARGUMENTS: print one pytest command per core, each running its share of the tests. A share
# may be empty (exit code 5).
shards() {
  for ((i = 1; i <= cores; i++)); do
    echo "python3 -m pytest $* -p benchmarks.harness.pytest_shard --shard $i/$cores || [ \$? -eq 5 ]"
  done
}

# bench NAME LIMIT FILES...: run benchmarks. Groups that have not started after 3/5 of the limit are
# skipped.
bench() {
  local name=$1 limit
  limit=$(within "$2")
  shift 2
  part "$name" "$limit" python3 -m pytest "${@/#/benchmarks/bench_}" --benchmark-only \
    --benchmark-json "$out/parts/$name.json" --time-limit $((limit * 3 / 5)) "${sizes[@]}"
}

check="benchmarks --benchmark-only --check"
if [ -n "$rehearse" ]; then
  sizes=(--tiny --device cpu)
  cores=1
  tests=(tests/ops/test_logdet.py)
  build=(python3 -c 'import mflow_kernels._C') # do not rebuild: others may use it
  checks=$(shards "$check ${sizes[*]} -k accumulate_logdet")
else
  sizes=(--device cuda)
  cores=$(env -u OMP_NUM_THREADS nproc) # nproc obeys OMP_NUM_THREADS
  tests=(tests/ops tests/layers tests/reversible tests/models tests/interop/test_params.py)
  # The others need packages of the extra `train`, which a GPU machine may lack.
  if python3 -c 'import lightning, mlxtend' 2>>"$log"; then
    tests+=(tests/training/test_graph_runs.py)
  else
    say "no packages of mflow_kernels[train]: test_plain_glow.py and the runs with CUDA graphs are left out"
    tests+=(--ignore tests/models/test_plain_glow.py)
  fi
  # If the CUDA build fails, build the CPU part for the tests after it, and report the failure.
  build=(bash -c 'MFLOW_CUDA=1 python3 setup.py build_ext --inplace ||
    { python3 setup.py build_ext --inplace; exit 1; }')
  # Compile the kernels of the benchmarks on all cores. K = 32 uses the same kernels as other K.
  checks=$(shards "$check ${sizes[*]} --ignore benchmarks/bench_ceilings.py -k 'not K32'"
    for side in 256 512 1024; do
      echo "python3 -m pytest $check ${sizes[*]} -k '3x${side}x$side-L6 and mflow_kernels'"
    done)
fi

part environment 20 python3 -m mflow_kernels.env
part build 90 "${build[@]}"
[ -n "$rehearse" ] || part kernels 60 python3 -m mflow_kernels.env --check
together tests 120 "$(shards -m gpu "${tests[@]}")"
together check 80 "$checks"
bench models 90 models.py layers.py interop.py sequences.py
bench ops 60 ops.py
bench ceilings 150 training.py ceilings.py
results=("$out"/parts/*.json)
part forecast 60 bash -c 'out=$1; shift; python3 -m benchmarks.reports.forecast "$@" >"$out/forecast.txt"' _ "$out" ${rehearse:+--tiny} --measured "${results[@]}"
part report 30 python3 -m benchmarks.report "${results[@]}" --save "$out/results.json" --out "$out"

if [ ${#failed[@]} -eq 0 ]; then
  say "all parts passed in $((SECONDS - started)) s"
  exit 0
fi
say "failed, after $((SECONDS - started)) s:"
for name in "${failed[@]}"; do say "  $name"; done
exit 1
