# Shared by the scripts in this folder: source it first. Sets ROOT and goes there.
# shellcheck shell=bash
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "${ROOT}"
JOBS="${ZIGZAG_JOBS:-$(nproc)}"
VENV="${ROOT}/.venv"
export CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-${JOBS}}"
export CMAKE_BUILD_PARALLEL_LEVEL="${JOBS}"

say() { printf '\n== %s\n' "$*"; }
note() { printf -- '-- %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# A Python 3 for small tools: the virtual environment when there is one, else the system's.
python_command() {
  if [[ -x "${VENV}/bin/python" ]]; then
    echo "${VENV}/bin/python"
  else
    command -v python3 || die "python3 is not installed (scripts/setup installs it)"
  fi
}

# CUDA builds are slow: the daily presets build it only where a GPU answers.
# ZIGZAG_CUDA=AUTO|ON|OFF in the environment decides otherwise.
cuda_choice() {
  if [[ -n "${ZIGZAG_CUDA:-}" ]]; then
    echo "${ZIGZAG_CUDA}"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo AUTO
  else
    echo OFF
  fi
}

# configure_and_build PRESET [cmake options...]
configure_and_build() {
  local preset="$1"
  shift
  say "configure and build: ${preset}"
  cmake --preset "${preset}" "$@"
  cmake --build --preset "${preset}"
}
