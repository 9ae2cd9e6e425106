// Ends what bf16_target_begin.h began.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ZIGZAG_BF16_TARGET
#undef ZIGZAG_BF16_PRAGMA
#undef ZIGZAG_BF16_PRAGMA_OF
