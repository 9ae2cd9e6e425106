# ZIGZAG_VERSION, read from the public header so that it is written down once.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../include/zigzag/version.h" _lines
     REGEX "#define ZIGZAG_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
string(REGEX REPLACE "[^0-9;]" "" _numbers "${_lines}")
string(REPLACE ";" "." ZIGZAG_VERSION "${_numbers}")
