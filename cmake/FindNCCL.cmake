# NCCL::headers and NCCL_VERSION. The library itself is opened at run time.
include(FindPackageHandleStandardArgs)
include(ZigzagWheels)
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${ZIGZAG_WHEEL_INCLUDE_DIRS} "$ENV{NCCL_HOME}/include"
          PATHS /usr/local/cuda/include)
if(NCCL_INCLUDE_DIR)
  file(STRINGS "${NCCL_INCLUDE_DIR}/nccl.h" _lines
       REGEX "^#define NCCL_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" _lines "${_lines}")
  string(REPLACE ";" "." NCCL_VERSION "${_lines}")
endif()
find_package_handle_standard_args(NCCL REQUIRED_VARS NCCL_INCLUDE_DIR VERSION_VAR NCCL_VERSION)
if(NCCL_FOUND AND NOT TARGET NCCL::headers)
  add_library(NCCL::headers INTERFACE IMPORTED)
  target_include_directories(NCCL::headers INTERFACE "${NCCL_INCLUDE_DIR}")
endif()
mark_as_advanced(NCCL_INCLUDE_DIR)
