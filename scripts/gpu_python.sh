#!/usr/bin/env bash
# Runs the Python package of build/gpu_python (made by scripts/gpu_python_pack) on a machine with GPUs:
# logs as one archive and JSON go to $OUT (default build/gpu_out), a short summary is printed last. A
# part that fails does not stop the others. About 200 s on two GPUs.
#   scripts/gpu_python.sh [parts: figures seed tests memory]      default: all
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT="${OUT:-build/gpu_out}"
carry="${PWD}/build/gpu_python"
logs="$(mktemp -d)"
mkdir -p "${OUT}"
summary="${OUT}/python_summary.txt"
: >"${summary}"
chmod +x "${carry}/zigzag"
export PYTHONPATH="${carry}" LD_LIBRARY_PATH="${carry}/zigzag_attention/lib:${LD_LIBRARY_PATH:-}"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export ZIGZAG_TIMEOUT_S="${ZIGZAG_TIMEOUT_S:-60}" OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false
gpus="$(nvidia-smi -L 2>/dev/null | wc -l)"
ranks=$((gpus > 1 ? 2 : 1))
began="$(date +%s)"
# Nothing else can run without it.
python3 -c 'import torch, zigzag_attention as z; print("torch", torch.__version__, "zigzag", z.version())' || exit 1

# part NAME SECONDS COMMAND...: its output goes to NAME.log.
part() {
  local name="$1" limit="$2" start code
  shift 2
  start="$(date +%s)"
  timeout --kill-after=10 "${limit}" "$@" >"${logs}/${name}.log" 2>&1
  code=$?
  printf '%-26s exit %3d  %4d s\n' "${name}" "${code}" "$(($(date +%s) - start))" | tee -a "${summary}"
}

tests() {
  local name="$1"
  shift
  part "${name}" 170 python3 -m pytest -rfEs -p no:cacheprovider -W ignore "$@"
}

figures() {
  part components 60 python3 -c 'import zigzag_attention as z; [print(*row) for row in z.components()]'
  part torch_ranks 90 torchrun --nproc_per_node "${ranks}" benchmarks/gpu/torch_ranks.py --json "${OUT}/torch_ranks.json"
  [[ "${ranks}" == 2 ]] && part torch_ranks_nccl 90 env ZIGZAG_GPU_COMM=nccl torchrun --nproc_per_node 2 \
    benchmarks/gpu/torch_ranks.py --json "${OUT}/torch_ranks_nccl.json"
  # The commands below as the seed prints them; this one times kernels, so nothing else runs.
  part seed_kernels 90 torchrun --nproc_per_node "${ranks}" test/zigzag_llama3_component_tests/test_triton_kernels.py
  ZIGZAG_GPU_ALONE=1 tests two_gpus_alone "test/gpu_python/test_ranks.py" -k "two_gpus and environment0"
}

# The commands as the seed prints them, side by side; PET_MASTER_PORT is torchrun's --master_port.
seed() {
  local folder=test/zigzag_llama3_component_tests one=::test_extract_zigzag_kv_slices_single_sequence
  at 1 seed_pytest -m pytest "${folder}/test_triton_kernels.py" -v &
  at 2 seed_one_test -m pytest "${folder}/test_triton_kernels.py${one}" -v &
  at 3 seed_rearrange "${folder}/test_zigzag_rearrange_functions.py" &
  at 4 seed_extract_local "${folder}/test_extract_local.py" &
  at 5 seed_end_to_end test/test_zigzag_llama3_flash_attn_varlen_func.py &
  part seed_end_to_end_alone 160 python3 test/test_zigzag_llama3_flash_attn_varlen_func.py &
}

at() {
  local port="$1" name="$2"
  shift 2
  PET_MASTER_PORT="$((29500 + port))" part "${name}" 160 torchrun --nproc_per_node "${ranks}" "$@"
}

no_gpu() {
  export CUDA_VISIBLE_DEVICES=""
  local options="--ranks 2 --lengths 64,32"
  for command in "run ${options} --device cuda" "bench attention ${options} --device cuda" "run ${options} --device cuda --comm nccl" \
    "run ${options} --device cuda --comm threads" "run ${options} --comm peer"; do
    echo "zigzag ${command}"
    # shellcheck disable=SC2086
    "${carry}/zigzag" ${command}
    echo "exit $?"
  done
}

for what in "${@:-all}"; do
  [[ "${what}" == figures || "${what}" == all ]] && figures
  [[ "${what}" == seed || "${what}" == all ]] && seed
  if [[ "${what}" == tests || "${what}" == all ]]; then
    (no_gpu >"${logs}/no_gpu.log" 2>&1) &
    tests gpu_python test/gpu_python -n 8 --dist worksteal -m "not hog" &
  fi
  wait
  [[ "${what}" == memory || "${what}" == all ]] && tests too_little_memory test/gpu_python -m hog
done
tar -C "${logs}" -czf "${OUT}/python_logs.tar.gz" .

echo "=== failures and figures (commit $(cat "${carry}/commit.txt"), $(($(date +%s) - began)) s)"
for log in "${logs}"/*.log; do
  echo "--- ${log##*/}"
  case "${log##*/}" in
    gpu_python.log | two_gpus_alone.log | too_little_memory.log) grep -E '^(FAILED|ERROR|SKIPPED|E  )|passed|failed' "${log}" | cut -c1-220 | tail -n 60 ;;
    seed_pytest.log | seed_one_test.log) grep -E 'passed|failed|Error' "${log}" | tail -n 6 ;;
    seed_*) grep -E 'FAILED|Error|Speedup|Triton|Python ref|All [0-9]+ tests' "${log}" | cut -c1-200 | tail -n 20 ;;
    *) tail -n 14 "${log}" | cut -c1-220 ;;
  esac
done
cat "${summary}"
