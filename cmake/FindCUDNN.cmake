# CUDNN::headers and CUDNN_VERSION. The library itself is opened at run time.
include(FindPackageHandleStandardArgs)
include(ZigzagWheels)
find_path(CUDNN_INCLUDE_DIR cudnn.h HINTS ${ZIGZAG_WHEEL_INCLUDE_DIRS} "$ENV{CUDNN_PATH}/include"
          PATHS /usr/local/cuda/include)
if(CUDNN_INCLUDE_DIR AND EXISTS "${CUDNN_INCLUDE_DIR}/cudnn_version.h")
  file(STRINGS "${CUDNN_INCLUDE_DIR}/cudnn_version.h" _lines
       REGEX "^#define CUDNN_(MAJOR|MINOR|PATCHLEVEL) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" _lines "${_lines}")
  string(REPLACE ";" "." CUDNN_VERSION "${_lines}")
endif()
find_package_handle_standard_args(CUDNN REQUIRED_VARS CUDNN_INCLUDE_DIR VERSION_VAR CUDNN_VERSION)
if(CUDNN_FOUND AND NOT TARGET CUDNN::headers)
  add_library(CUDNN::headers INTERFACE IMPORTED)
  target_include_directories(CUDNN::headers INTERFACE "${CUDNN_INCLUDE_DIR}")
endif()
mark_as_advanced(CUDNN_INCLUDE_DIR)
