# Cutlass::headers and Cutlass_VERSION: the header-only libraries CuTe and CUTLASS.
include(FindPackageHandleStandardArgs)
include(ZigzagWheels)
find_path(Cutlass_INCLUDE_DIR cute/tensor.hpp HINTS ${ZIGZAG_WHEEL_INCLUDE_DIRS}
          PATHS /usr/local/cuda/include)
if(Cutlass_INCLUDE_DIR AND EXISTS "${Cutlass_INCLUDE_DIR}/cutlass/version.h")
  file(STRINGS "${Cutlass_INCLUDE_DIR}/cutlass/version.h" _lines
       REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) +[0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" _lines "${_lines}")
  string(REPLACE ";" "." Cutlass_VERSION "${_lines}")
endif()
find_package_handle_standard_args(Cutlass REQUIRED_VARS Cutlass_INCLUDE_DIR VERSION_VAR Cutlass_VERSION)
if(Cutlass_FOUND AND NOT TARGET Cutlass::headers)
  add_library(Cutlass::headers INTERFACE IMPORTED)
  target_include_directories(Cutlass::headers SYSTEM INTERFACE "${Cutlass_INCLUDE_DIR}")
endif()
mark_as_advanced(Cutlass_INCLUDE_DIR)
