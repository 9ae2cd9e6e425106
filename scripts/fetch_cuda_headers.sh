#!/usr/bin/env bash
# Fetches the headers of cuDNN, cudnn-frontend, NCCL, NVRTC and CUTLASS from NVIDIA's PyPI wheels.
# Only headers are kept, in build/cuda_headers/include (or $ZIGZAG_CUDA_HEADERS/include); the libraries
# are opened at run time. Does nothing when they are there already.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

target="${ZIGZAG_CUDA_HEADERS:-${ROOT}/build/cuda_headers}"
wheels=(
  nvidia-cudnn-frontend==1.22.1
  nvidia-cuda-nvrtc==13.0.88
  nvidia-nccl-cu13==2.28.9
  nvidia-cudnn-cu13==9.19.0.56
  nvidia-cutlass==4.2.0.0
)
stamp="${target}/wheels.txt"

if [[ -f "${stamp}" && "$(cat "${stamp}")" == "${wheels[*]}" ]]; then
  say "CUDA headers are in ${target}/include"
  exit 0
fi

python="$(python_command)"
mkdir -p "${target}"
work="$(mktemp -d "${target}/download.XXXXXX")"
trap 'rm -rf "${work}"' EXIT
for wheel in "${wheels[@]}"; do
  say "fetching the headers of ${wheel}"
  # The libraries inside are for Linux x86-64 whatever the build machine is; headers are the same.
  "${python}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "${work}/wheels" "${wheel}"
  "${python}" - "${work}" <<'PYTHON'
import pathlib, sys, zipfile

work = pathlib.Path(sys.argv[1])
for wheel in (work / "wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = pathlib.PurePosixPath(name).parts
            if "include" not in parts or name.endswith("/") or ".." in parts:
                continue
            path = work.joinpath("include", *parts[parts.index("include") + 1 :])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    wheel.unlink()
PYTHON
done
rm -rf "${target:?}/include"
mv "${work}/include" "${target}/include"
echo "${wheels[*]}" >"${stamp}"
say "CUDA headers are in ${target}/include"
