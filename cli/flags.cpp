#include "flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

std::string allowed_integers(std::int64_t least, std::int64_t most) {
  if (most == std::numeric_limits<std::int64_t>::max()) {
    return fmt::format("an integer of at least {}", least);
  }
  return fmt::format("an integer from {} to {}", least, most);
}

std::optional<std::int64_t> read_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::int64_t parse_integer(std::string_view what, std::string_view text, std::int64_t least,
                           std::int64_t most) {
  const auto value = read_integer(text);
  if (!value || *value < least || *value > most) {
    throw InvalidArgument(
        fmt::format("{} is '{}'; it must be {}", what, text, allowed_integers(least, most)));
  }
  return *value;
}

double parse_number(std::string_view what, std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    throw InvalidArgument(fmt::format("{} is '{}'; it must be a finite number", what, text));
  }
  return value;
}

std::vector<std::int64_t> parse_lengths(std::string_view what, std::string_view text) {
  std::vector<std::int64_t> lengths;
  while (true) {
    const std::size_t comma = std::min(text.find(','), text.size());
    const std::string_view item = text.substr(0, comma);
    const auto value = read_integer(item);
    if (!value || *value < 0) {
      throw InvalidArgument(
          fmt::format("{} holds '{}'; document lengths are integers of at least 0, separated by "
                      "commas",
                      what, item));
    }
    lengths.push_back(*value);
    if (comma == text.size()) return lengths;
    text.remove_prefix(comma + 1);
  }
}

CLI::Option* Flags::add(const std::string& name, const std::string& kind,
                        const std::string& initial, const std::string& help,
                        std::function<void(const std::string&)> parse) {
  auto* option = app_.add_option_function<std::string>(name, parse, help);
  option->type_name(kind)->group(group_);
  if (!initial.empty()) option->default_str(initial);
  return option;
}

CLI::Option* Flags::integer(const std::string& name, std::int64_t& value, std::int64_t least,
                            std::int64_t most, const std::string& help) {
  return add(name, "N", fmt::format("{}", value), help, [=, &value](const std::string& text) {
    value = parse_integer(name, text, least, most);
  });
}

CLI::Option* Flags::integer_or(const std::string& name, std::int64_t& value,
                               const std::string& word, std::int64_t word_value, std::int64_t least,
                               std::int64_t most, const std::string& help) {
  const std::string initial = value == word_value ? word : fmt::format("{}", value);
  return add(name, "N", initial, help, [=, &value](const std::string& text) {
    if (text == word) {
      value = word_value;
      return;
    }
    const auto number = read_integer(text);
    if (!number || *number < least || *number > most) {
      throw InvalidArgument(fmt::format("{} is '{}'; it must be '{}' or {}", name, text, word,
                                        allowed_integers(least, most)));
    }
    value = *number;
  });
}

CLI::Option* Flags::number(const std::string& name, std::optional<double>& value,
                           const std::string& help) {
  const std::string initial = value ? fmt::format("{}", *value) : "";
  return add(name, "X", initial, help,
             [=, &value](const std::string& text) { value = parse_number(name, text); });
}

CLI::Option* Flags::choice(const std::string& name, std::string& value,
                           std::vector<std::string> words, const std::string& help) {
  const std::string kind = fmt::format("{}", fmt::join(words, "|"));
  return add(name, kind, value, help, [=, &value](const std::string& text) {
    if (std::find(words.begin(), words.end(), text) == words.end()) {
      throw InvalidArgument(
          fmt::format("{} is '{}'; allowed are {}", name, text, fmt::join(words, ", ")));
    }
    value = text;
  });
}

CLI::Option* Flags::boolean(const std::string& name, bool& value, const std::string& help) {
  return add(
      name, "true|false", value ? "true" : "false", help, [=, &value](const std::string& text) {
        if (text != "true" && text != "false") {
          throw InvalidArgument(fmt::format("{} is '{}'; allowed are true, false", name, text));
        }
        value = text == "true";
      });
}

CLI::Option* Flags::toggle(const std::string& name, bool& value, const std::string& help) {
  return app_.add_flag(name, value, help)->group(group_);
}

CLI::Option* Flags::text(const std::string& name, std::string& value, const std::string& kind,
                         const std::string& help) {
  return add(name, kind, value, help, [=, &value](const std::string& text) {
    if (text.empty()) throw InvalidArgument(fmt::format("{} is empty; it needs a value", name));
    value = text;
  });
}

CLI::Option* Flags::texts(const std::string& name, std::vector<std::string>& values,
                          const std::string& kind, const std::string& help) {
  return app_.add_option(name, values, help)->type_name(kind)->group(group_)->expected(1, -1);
}

}  // namespace zigzag::cli
