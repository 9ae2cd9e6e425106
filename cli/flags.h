#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

namespace zigzag::cli {

/// What a subcommand leaves for main to do once all flags are read; returns the exit code.
using Action = std::function<int()>;

/// Declares the flags of a subcommand. One call a flag gives its name, its default (the value of
/// the variable), its parser and its line of help. A value that does not parse throws
/// InvalidArgument with flag, value and what is allowed.
class Flags {
 public:
  explicit Flags(CLI::App& app) : app_(app) {}

  /// Starts a group of the help text.
  void group(std::string name) { group_ = std::move(name); }
  CLI::Option* integer(const std::string& name, std::int64_t& value, std::int64_t least,
                       std::int64_t most, const std::string& help);
  /// An integer that may also be a word, which stands for `word_value`.
  CLI::Option* integer_or(const std::string& name, std::int64_t& value, const std::string& word,
                          std::int64_t word_value, std::int64_t least, std::int64_t most,
                          const std::string& help);
  CLI::Option* number(const std::string& name, std::optional<double>& value,
                      const std::string& help);
  CLI::Option* choice(const std::string& name, std::string& value, std::vector<std::string> words,
                      const std::string& help);
  CLI::Option* boolean(const std::string& name, bool& value, const std::string& help);
  CLI::Option* toggle(const std::string& name, bool& value, const std::string& help);
  CLI::Option* text(const std::string& name, std::string& value, const std::string& kind,
                    const std::string& help);
  CLI::Option* texts(const std::string& name, std::vector<std::string>& values,
                     const std::string& kind, const std::string& help);

 private:
  CLI::Option* add(const std::string& name, const std::string& kind, const std::string& initial,
                   const std::string& help, std::function<void(const std::string&)> parse);

  CLI::App& app_;
  std::string group_ = "Options";
};

/// An integer in [least, most]. Throws InvalidArgument that names `what`.
std::int64_t parse_integer(std::string_view what, std::string_view text, std::int64_t least,
                           std::int64_t most);

/// A finite number. Throws InvalidArgument that names `what`.
double parse_number(std::string_view what, std::string_view text);

/// "512,1024,768" -> lengths of at least 0. Throws InvalidArgument that names `what`.
std::vector<std::int64_t> parse_lengths(std::string_view what, std::string_view text);

}  // namespace zigzag::cli
