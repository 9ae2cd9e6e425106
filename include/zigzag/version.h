#pragma once

// The version of the library; CMake and the Python package read it from here.
#define ZIGZAG_VERSION_MAJOR 0
#define ZIGZAG_VERSION_MINOR 1
#define ZIGZAG_VERSION_PATCH 0
