// Functions from here to bf16_target_end.h are compiled for ZIGZAG_BF16_TARGET. No include guard:
// used once in each file of kernels.
#define ZIGZAG_BF16_PRAGMA(text) _Pragma(#text)
#define ZIGZAG_BF16_PRAGMA_OF(...) ZIGZAG_BF16_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
ZIGZAG_BF16_PRAGMA_OF(clang attribute push(__attribute__((target(ZIGZAG_BF16_TARGET))),
                                           apply_to = function))
#else
#pragma GCC push_options
ZIGZAG_BF16_PRAGMA_OF(GCC target(ZIGZAG_BF16_TARGET))
#endif
