#pragma once

// Compiles a function for several x86 levels and picks one at load time. The same source in the
// same order of operations: every level gives the same bits. Sanitizers start before the choice
// can be made, and other processors have no such levels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define ZIGZAG_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ZIGZAG_CLONES
#endif
