# `cmake --install`: the library, its headers, the command, and the CMake package.
if(NOT ZIGZAG_INSTALL)
  return()
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/zigzag")

install(TARGETS zigzag EXPORT zigzagTargets)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/zigzag" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h")
if(TARGET zigzag_cli)
  install(TARGETS zigzag_cli)
endif()
install(EXPORT zigzagTargets NAMESPACE zigzag:: DESTINATION "${_package_dir}")

# A static library hands its own libraries on to whoever links it.
get_target_property(_type zigzag TYPE)
if(_type STREQUAL "STATIC_LIBRARY")
  set(ZIGZAG_IS_STATIC ON)
else()
  set(ZIGZAG_IS_STATIC OFF)
endif()
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/zigzagConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/generated/zigzagConfig.cmake"
                              INSTALL_DESTINATION "${_package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/generated/zigzagConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/generated/zigzagConfig.cmake"
              "${PROJECT_BINARY_DIR}/generated/zigzagConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindHighway.cmake"
        DESTINATION "${_package_dir}")
