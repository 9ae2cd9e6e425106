#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace zigzag::cli {

/// 1234567 -> "1,234,567".
std::string count_text(std::int64_t value);
/// 1, "rank" -> "1 rank"; 2048, "rank" -> "2,048 ranks".
std::string plural(std::int64_t count, std::string_view noun);
/// 1536 -> "1.50 KiB".
std::string bytes_text(double bytes);
/// 1.2e12, "FLOP" -> "1.20 TFLOP".
std::string scaled_text(double value, std::string_view unit);
/// 0.0012 -> "1.20 ms".
std::string seconds_text(double seconds);
/// The text with &, <, > and " replaced as XML wants it; control characters become '?'.
std::string xml_text(std::string_view text);

}  // namespace zigzag::cli
