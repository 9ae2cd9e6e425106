find_package(Python3 REQUIRED COMPONENTS Interpreter)
add_test(NAME repository.rules
         COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/check_repository.py"
                 "${PROJECT_SOURCE_DIR}")
add_test(NAME repository.rules_find_planted_defects
         COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/check_repository_test.py")
set_tests_properties(repository.rules repository.rules_find_planted_defects PROPERTIES TIMEOUT 60)
