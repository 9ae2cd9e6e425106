# Flags. No -march and no global -mavx: Highway chooses the instruction set at run time.

# The same bits whatever the compiler: a fused multiply-add is written, never inferred.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
                    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-ffp-contract=off>)

if(ZIGZAG_SANITIZE)
  string(REPLACE ";" "," _sanitizers "${ZIGZAG_SANITIZE}")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${_sanitizers}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=${_sanitizers})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 headers look uninitialised to it once a sanitizer has changed the code.
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
  endif()
endif()

set(ZIGZAG_WARNINGS
    -Wall
    -Wextra
    -Wpedantic
    -Wshadow
    -Wconversion
    -Wno-sign-conversion
    -Wold-style-cast
    -Wnon-virtual-dtor
    -Woverloaded-virtual
    -Wextra-semi
    -Wcast-qual
    -Wformat=2
    -Wundef)
# GCC 12 and 13 report overlaps inside their own std::string (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
  list(APPEND ZIGZAG_WARNINGS -Wno-restrict)
endif()

# zigzag_configure_target(TARGET): the warnings of our own code, for the library and every program.
function(zigzag_configure_target target)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET default)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>)
  if(ZIGZAG_WERROR)
    foreach(flag IN LISTS ZIGZAG_WARNINGS ITEMS -Werror)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${flag}>)
    endforeach()
  endif()
  # CUDA sources never compile with a warning, in any preset.
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>"
                                           "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
endfunction()

# zigzag_sources(FILE...): adds sources of this folder to the library.
function(zigzag_sources)
  list(TRANSFORM ARGN PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/")
  target_sources(zigzag PRIVATE ${ARGN})
endfunction()

# zigzag_executable(NAME SOURCE...): a program of this repository that uses the library.
function(zigzag_executable name)
  add_executable(${name} ${ARGN})
  zigzag_configure_target(${name})
  target_link_libraries(${name} PRIVATE zigzag::zigzag)
endfunction()
