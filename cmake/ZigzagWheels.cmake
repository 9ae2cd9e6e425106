# ZIGZAG_WHEEL_INCLUDE_DIRS: where the headers of NVIDIA's PyPI wheels may lie.
# First what scripts/fetch_cuda_headers.sh unpacked, then the packages of a Python environment.
set(ZIGZAG_CUDA_HEADERS "${CMAKE_CURRENT_LIST_DIR}/../build/cuda_headers" CACHE PATH
    "Folder with include/cudnn.h, include/nccl.h, include/cudnn_frontend.h")
get_filename_component(_fetched "${ZIGZAG_CUDA_HEADERS}" ABSOLUTE)
set(ZIGZAG_WHEEL_INCLUDE_DIRS "${_fetched}/include")
file(GLOB _site_packages
     "${CMAKE_CURRENT_LIST_DIR}/../.venv/lib/python3*/site-packages"
     "$ENV{VIRTUAL_ENV}/lib/python3*/site-packages")
foreach(_site IN LISTS _site_packages)
  file(GLOB _includes "${_site}/nvidia/*/include")
  list(APPEND ZIGZAG_WHEEL_INCLUDE_DIRS ${_includes} "${_site}/include")
endforeach()
