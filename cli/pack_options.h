#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flags.h"
#include "zigzag/attention.h"
#include "zigzag/options.h"
#include "zigzag/tensor.h"

namespace zigzag::cli {

/// Most tokens of a pack that the command takes, so that products with sizes stay in 64 bits.
inline constexpr std::int64_t kMaxTokens = std::int64_t{1} << 48;

/// Where the documents of a pack come from: exactly one of lengths, lengths_file, documents, input.
struct PackOptions {
  std::string lengths;
  std::string lengths_file;
  std::vector<std::string> documents;
  std::string input;
  std::int64_t max_tokens = -1;
  std::int64_t seed = 0;
  bool allows_input = false;

  /// Declares --lengths, --lengths-file, --documents and --max-tokens.
  void declare(Flags& flags);
  /// Declares --input and --seed.
  void declare_data(Flags& flags);
  /// Throws InvalidArgument unless exactly one source is given.
  void check() const;
};

/// Lengths of the documents of a pack and what was left out.
struct PackLengths {
  std::vector<std::int64_t> cu_seqlens;
  std::vector<std::string> notes;
};

/// The lengths that --lengths, --lengths-file or --documents name; reads no document. Throws
/// InvalidArgument for negative or malformed lengths and more than kMaxTokens tokens.
PackLengths read_lengths(const PackOptions& options);

/// Heads and element type.
struct ShapeOptions {
  std::int64_t heads = 8;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 64;
  std::string dtype = "float32";
  /// Which of them the caller gave, for files that say it themselves.
  CLI::Option* heads_given = nullptr;
  CLI::Option* kv_heads_given = nullptr;
  CLI::Option* head_dim_given = nullptr;
  CLI::Option* dtype_given = nullptr;

  void declare(Flags& flags);
  /// Throws InvalidArgument unless kv_heads divides heads.
  void check() const;
  DType type() const { return parse_dtype(dtype); }
};

/// What attention computes.
struct MaskOptions {
  bool causal = true;
  std::string window;
  std::optional<double> softcap = 0.0;
  std::optional<double> scale;

  /// Declares --causal and --window.
  void declare(Flags& flags);
  /// Declares --softcap and --scale.
  void declare_scores(Flags& flags);
  /// The mask. Throws InvalidArgument for a malformed window.
  Mask mask() const;
  /// Puts mask, softcap and scale into `options`. Throws InvalidArgument.
  void apply(AttentionOptions& options) const;
};

}  // namespace zigzag::cli
