#!/bin/bash
# What only a GPU can show, within a quarter of an hour: a smoke test of every policy, the benchmark, the test suite, and a
# part of it under compute-sanitizer; and writes a report.
#
# Usage: bench/on_gpu.sh [-o folder] [--library file] [stage ...]
#   folder   of the report and the logs; by default $OUT, or else build/on_gpu
#   file     a library of the kernels, built beforehand (libnatten_cuda.so of a build with NATTEN_CUDA_ALL_POLICIES): the
#            package is then built without CUDA, in a minute, and the library put beside it
#   stages   build, smoke, bench, test, memcheck, racecheck, in this order; all of them by default. One that fails, or
#            exceeds its time, does not keep the next from running, but for build.
#
# Each stage may take the seconds in its variable: LIMIT_BUILD (1800, with --library 180), LIMIT_SMOKE (120), LIMIT_BENCH
# (240), LIMIT_TEST (180), LIMIT_MEMCHECK (90), LIMIT_RACECHECK (60): together, with --library, 14.5 minutes at most.
#
# Needs g++, CMake 3.20, Ninja, without --library also nvcc (11.8 or later; 12 at most for SM50 to SM70), and a Python with
# torch for CUDA, pybind11, scikit-build-core, pytest, NumPy, tqdm, and the headers of nvidia-cutlass 4.2. What of these
# Python packages is missing is installed from the wheels in the folder $WHEELS, where it is set: then nothing is downloaded.
# PYTEST_ARGS and BENCH_ARGS are passed on, PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${OUT:-build/on_gpu}
library=
while true; do
  case ${1:-} in
    -o) folder=${2:?-o wants a folder} ;;
    --library) library=$(realpath -e "${2:?--library wants a file}") || exit ;;
    *) break ;;
  esac
  shift 2
done
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build smoke bench test memcheck racecheck)

limit_of() {
  case $1 in
    build) if [ -n "$library" ]; then echo "${LIMIT_BUILD:-180}"; else echo "${LIMIT_BUILD:-1800}"; fi ;;
    smoke) echo "${LIMIT_SMOKE:-120}" ;;
    bench) echo "${LIMIT_BENCH:-240}" ;;
    test) echo "${LIMIT_TEST:-180}" ;;
    memcheck) echo "${LIMIT_MEMCHECK:-90}" ;;
    *) echo "${LIMIT_RACECHECK:-60}" ;;
  esac
}

# At most what is left of the stage's time; a program that does not heed it is killed.
within() {
  timeout --kill-after=10 "$((deadline - SECONDS > 0 ? deadline - SECONDS : 1))" "$@"
}

build() {
  local arch options=()
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return
  if [ -n "${WHEELS:-}" ]; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
    within "$python" -m pip install --no-deps "$WHEELS"/*.whl || return
  fi
  if [ -n "$library" ]; then
    options=(NATTEN_CUDA=OFF)
  else
    options=(NATTEN_CUDA=ON "NATTEN_CUDA_ARCHS=$arch" NATTEN_CUDA_ALL_POLICIES=ON)
  fi
  within "$python" -m pip install --no-build-isolation --no-deps --force-reinstall --verbose . \
    "${options[@]/#/--config-settings=cmake.define.}" || return
  if [ -n "$library" ]; then
    cp "$library" "$(cd / && "$python" -c 'import natten._C; print(natten._C.__file__)' | xargs dirname)/libnatten_cuda.so"
  fi
}

# Every policy on one problem of each rank: what is broken shows in the first two minutes.
run_smoke() {
  within "$python" -m pytest --device cuda --quiet -p no:cacheprovider tests/test_kernels.py \
    -k "test_feature and (rank1 or rank2 or rank3)"
}

# shellcheck disable=SC2086  # PYTEST_ARGS and BENCH_ARGS are several words
run_bench() {
  within "$python" -m bench --device cuda --json "$folder/bench.json" ${BENCH_ARGS:---quick}
}

# shellcheck disable=SC2086
run_tests() {
  within "$python" -m pytest --device cuda --quiet -p no:cacheprovider ${PYTEST_ARGS:-}
}

# Every policy, on problems of each rank and with all operands. Torch's allocator would hide what leaves a tensor.
sanitize() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  within compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$python" -m pytest --device cuda --quiet -p no:cacheprovider tests/test_kernels.py -k "$2"
}

run_stage() {
  deadline=$((SECONDS + $(limit_of "$1")))
  case $1 in
    build) build ;;
    smoke) run_smoke ;;
    bench) run_bench ;;
    test) run_tests ;;
    memcheck) sanitize memcheck "test_feature and (rank1 or rank3 or boxes or additional or rpb or gqa)" ;;
    racecheck) sanitize racecheck "test_feature and (rank2 or rpb)" ;;
    *)
      echo "no stage is called $1: build, smoke, bench, test, memcheck, racecheck" >&2
      return 2
      ;;
  esac
}

mkdir -p "$folder" || exit
report=$folder/report.md
{
  echo "# natten on a GPU"
  echo
  echo "- $(git describe --always --dirty 2>/dev/null || echo "an unknown commit"), $(date -u +"%F %T") UTC"
  echo "- $(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>&1 | head -n 1)"
  if [ -n "$library" ]; then
    echo "- kernels: $(basename "$library"), SHA-256 $(sha256sum <"$library" | cut -c 1-16)"
  else
    echo "- $(nvcc --version 2>&1 | tail -n 1)"
  fi
  echo "- $("$python" -c 'import sys, torch; print("Python", sys.version.split()[0] + ", torch", torch.__version__)' 2>&1 | tail -n 1)"
  echo
  echo "| stage | result | seconds | last line |"
  echo "| --- | --- | ---: | --- |"
} >"$report"

failures=0
for stage in "${stages[@]}"; do
  log=$folder/$stage.log
  begin=$SECONDS
  (run_stage "$stage") 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) result=passed ;;
    124 | 137) result="OUT OF TIME" ;;
    *) result=FAILED ;;
  esac
  [ "$status" = 0 ] || failures=$((failures + 1))
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '|' '/' | cut -c 1-120)
  echo "| $stage | $result | $((SECONDS - begin)) | $last |" >>"$report"
  if [ "$stage" = build ] && [ "$status" != 0 ]; then
    break
  fi
done
if [ -f "$folder/bench.json" ]; then
  {
    echo
    "$python" -m bench --device cuda --load "$folder/bench.json" --markdown 2>&1
  } >>"$report"
fi
cat "$report"
[ $failures -eq 0 ]
