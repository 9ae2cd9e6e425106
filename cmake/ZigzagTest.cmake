# zigzag_test(NAME ...): a GoogleTest program made of NAME.cpp (and SOURCES), each case known to ctest.
# LABELS choose what runs where: `sanitize` marks what scripts/sanitize runs, `slow` what takes over 10 s.
find_package(GTest REQUIRED)
include(GoogleTest)

function(zigzag_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT" "SOURCES;LIBRARIES;LABELS")
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  zigzag_executable(${name} ${name}.cpp ${arg_SOURCES})
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/src"
                                             "${PROJECT_BINARY_DIR}/generated")
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} GTest::gmock GTest::gtest_main fmt::fmt)
  gtest_discover_tests(
    ${name}
    DISCOVERY_MODE PRE_TEST
    DISCOVERY_TIMEOUT 120
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
    PROPERTIES TIMEOUT ${arg_TIMEOUT} LABELS "${arg_LABELS}")
endfunction()
