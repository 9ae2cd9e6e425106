# A sanitized library needs a sanitized consumer, which is not what this test is about.
if(ZIGZAG_INSTALL AND NOT ZIGZAG_SANITIZE)
  add_test(NAME consumer.find_package
           COMMAND "${CMAKE_COMMAND}" "-DBUILD=${PROJECT_BINARY_DIR}" "-DWORK=${PROJECT_BINARY_DIR}/consumer"
                   "-DSOURCE=${CMAKE_CURRENT_LIST_DIR}" "-DGENERATOR=${CMAKE_GENERATOR}"
                   "-DCOMPILER=${CMAKE_CXX_COMPILER}" -P "${CMAKE_CURRENT_LIST_DIR}/run.cmake")
  set_tests_properties(consumer.find_package PROPERTIES TIMEOUT 300)
endif()
