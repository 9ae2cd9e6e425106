# CudnnFrontend::headers and CudnnFrontend_VERSION: a header-only library over cuDNN's C interface.
include(FindPackageHandleStandardArgs)
include(ZigzagWheels)
find_path(CudnnFrontend_INCLUDE_DIR cudnn_frontend.h HINTS ${ZIGZAG_WHEEL_INCLUDE_DIRS}
          PATHS /usr/local/cuda/include)
if(CudnnFrontend_INCLUDE_DIR AND EXISTS "${CudnnFrontend_INCLUDE_DIR}/cudnn_frontend_version.h")
  file(STRINGS "${CudnnFrontend_INCLUDE_DIR}/cudnn_frontend_version.h" _lines
       REGEX "^#define CUDNN_FRONTEND_(MAJOR|MINOR|PATCH)_VERSION [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" _lines "${_lines}")
  string(REPLACE ";" "." CudnnFrontend_VERSION "${_lines}")
endif()
find_package_handle_standard_args(CudnnFrontend REQUIRED_VARS CudnnFrontend_INCLUDE_DIR
                                  VERSION_VAR CudnnFrontend_VERSION)
if(CudnnFrontend_FOUND AND NOT TARGET CudnnFrontend::headers)
  add_library(CudnnFrontend::headers INTERFACE IMPORTED)
  target_include_directories(CudnnFrontend::headers INTERFACE "${CudnnFrontend_INCLUDE_DIR}")
  # cuDNN, NVRTC and the driver are opened at run time, so one binary works with and without them.
  target_compile_definitions(CudnnFrontend::headers INTERFACE NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING)
endif()
mark_as_advanced(CudnnFrontend_INCLUDE_DIR)
