# The command as a user meets it: scripts of the standard library, each with the built program.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
foreach(_script IN ITEMS bad_input_test bench_test docs_test plan_test run_test)
  if(TARGET zigzag_cli AND EXISTS "${CMAKE_CURRENT_LIST_DIR}/${_script}.py")
    add_test(NAME cli.${_script}
             COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/${_script}.py"
                     $<TARGET_FILE:zigzag_cli>)
    set_tests_properties(cli.${_script} PROPERTIES TIMEOUT 590 LABELS cli)
  endif()
endforeach()
