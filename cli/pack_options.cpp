#include "pack_options.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include <fmt/format.h>

#include "io/documents.h"
#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

constexpr std::int64_t kMaxHeads = 4096;
constexpr std::int64_t kMaxHeadDim = 4096;
// Magnitudes of --scale and --softcap with which scores stay in the range of float32.
constexpr double kLeastFactor = 1e-30;
constexpr double kMostFactor = 1e30;
constexpr std::int64_t kMostInteger = std::numeric_limits<std::int64_t>::max();

// A file of lengths separated by commas, blanks or newlines; '#' starts a comment.
std::vector<std::int64_t> read_lengths_file(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw InvalidArgument(fmt::format(
        "--lengths-file '{}' {}", path,
        std::filesystem::exists(path, error) ? "is not a regular file" : "does not exist"));
  }
  std::ifstream file(path);
  std::vector<std::int64_t> lengths;
  std::string line;
  for (std::int64_t number = 1; std::getline(file, line); ++number) {
    line.resize(std::min(line.find('#'), line.size()));
    for (char& c : line) {
      if (c == ',' || c == '\t' || c == '\r') c = ' ';
    }
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      std::string what = fmt::format("--lengths-file '{}', line {}", path, number);
      lengths.push_back(parse_lengths(what, word.substr(0, 80)).front());
    }
  }
  if (file.bad() || !file.eof()) {
    throw InvalidArgument(fmt::format("--lengths-file '{}' cannot be read", path));
  }
  if (lengths.empty()) {
    throw InvalidArgument(
        fmt::format("--lengths-file '{}' holds no length; one integer a document is wanted", path));
  }
  return lengths;
}

std::string tokens_sentence(std::int64_t most) {
  return fmt::format("the documents have more than {} tokens; at most 2^48 are allowed", most);
}

}  // namespace

void PackOptions::declare(Flags& flags) {
  flags.group("Pack (choose one source)");
  flags.text("--lengths", lengths, "L0,L1,...", "Document lengths in tokens");
  flags.text("--lengths-file", lengths_file, "FILE",
             "A text file of document lengths; '#' starts a comment");
  flags.texts("--documents", documents, "PATH",
              "Files, or folders of files: bytes are tokens, one document a file");
  flags.integer_or("--max-tokens", max_tokens, "-1", -1, 1, kMaxTokens,
                   "Cut the pack after N tokens (-1: no limit)");
}

void PackOptions::declare_data(Flags& flags) {
  allows_input = true;
  flags.text("--input", input, "FILE.safetensors",
             "Tensors q, k, v (global order), cu_seqlens, and dout if present");
  flags.integer("--seed", seed, 0, kMostInteger, "Seed of everything that is drawn");
}

void PackOptions::check() const {
  const int sources = static_cast<int>(!lengths.empty()) + static_cast<int>(!lengths_file.empty()) +
                      static_cast<int>(!documents.empty()) + static_cast<int>(!input.empty());
  if (sources == 1) return;
  throw InvalidArgument(fmt::format(
      "{} of the sources of documents is given; give exactly one of --lengths, --lengths-file, "
      "--documents{}",
      sources == 0 ? "none" : "more than one", allows_input ? ", --input" : ""));
}

PackLengths read_lengths(const PackOptions& options) {
  PackLengths pack;
  if (!options.documents.empty()) {
    io::DocumentList list = io::list_documents(options.documents, options.max_tokens);
    if (list.cu_seqlens.back() > kMaxTokens) throw InvalidArgument(tokens_sentence(kMaxTokens));
    return {std::move(list.cu_seqlens), std::move(list.notes)};
  }
  const std::vector<std::int64_t> lengths = options.lengths.empty()
                                                ? read_lengths_file(options.lengths_file)
                                                : parse_lengths("--lengths", options.lengths);
  const std::int64_t limit = options.max_tokens < 0 ? kMostInteger : options.max_tokens;
  pack.cu_seqlens.reserve(lengths.size() + 1);
  pack.cu_seqlens.push_back(0);
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const std::int64_t before = pack.cu_seqlens.back();
    if (before == limit) {
      pack.notes.push_back(
          fmt::format("left out {} of {} documents: the limit of {} tokens is "
                      "reached",
                      lengths.size() - i, lengths.size(), limit));
      break;
    }
    const std::int64_t taken = std::min(lengths[i], limit - before);
    if (taken < lengths[i]) {
      pack.notes.push_back(
          fmt::format("cut document {} after {} of {} tokens: the limit of {} "
                      "tokens is reached",
                      i, taken, lengths[i], limit));
    }
    if (taken > kMaxTokens - before) throw InvalidArgument(tokens_sentence(kMaxTokens));
    pack.cu_seqlens.push_back(before + taken);
  }
  return pack;
}

void ShapeOptions::declare(Flags& flags) {
  flags.group("Shape");
  heads_given = flags.integer("--heads", heads, 1, kMaxHeads, "Query heads");
  kv_heads_given =
      flags.integer("--kv-heads", kv_heads, 1, kMaxHeads, "KV heads, a divisor of --heads");
  head_dim_given = flags.integer("--head-dim", head_dim, 1, kMaxHeadDim, "Elements of a head");
  dtype_given = flags.choice("--dtype", dtype, {"float32", "float16", "bfloat16"},
                             "Element type of q, k, v and the gradients");
}

void ShapeOptions::check() const {
  if (heads % kv_heads == 0) return;
  const auto source = [](const CLI::Option* given) {
    return given != nullptr && given->count() == 0 ? " (the default)" : "";
  };
  throw InvalidArgument(fmt::format(
      "--kv-heads {}{} does not divide --heads {}{}; each KV head serves the same number of query "
      "heads",
      kv_heads, source(kv_heads_given), heads, source(heads_given)));
}

void MaskOptions::declare(Flags& flags) {
  flags.group("Mask");
  flags.boolean("--causal", causal, "A query sees no later key");
  flags.text("--window", window, "LEFT[,RIGHT]",
             "Keys that a query sees before it and, if not causal, after it; -1: all");
}

void MaskOptions::declare_scores(Flags& flags) {
  flags.number("--softcap", softcap, "Scores s become X tanh(s / X); 0: none");
  flags.number("--scale", scale, "Multiplies q.k [1/sqrt(head_dim)]");
}

Mask MaskOptions::mask() const {
  Mask mask;
  mask.causal = causal;
  if (!window.empty()) {
    const std::size_t comma = window.find(',');
    const auto side = [&](std::string_view text) {
      try {
        return parse_integer("--window", text, -1, kMaxTokens);
      } catch (const InvalidArgument&) {
        throw InvalidArgument(fmt::format(
            "--window is '{}'; it must be LEFT or LEFT,RIGHT, each an integer from -1 to {} "
            "(-1: unbounded)",
            window, kMaxTokens));
      }
    };
    mask.window_left = side(std::string_view(window).substr(0, comma));
    if (comma != std::string::npos) {
      mask.window_right = side(std::string_view(window).substr(comma + 1));
    }
    if (causal && mask.window_right > 0) {
      throw InvalidArgument(fmt::format(
          "--window is '{}', but a causal query sees no later key; give a RIGHT of 0 or "
          "--causal false",
          window));
    }
  }
  if (mask.causal) mask.window_right = 0;
  return mask;
}

void MaskOptions::apply(AttentionOptions& options) const {
  options.mask = mask();
  const auto in_range = [](double x) { return x == 0 || (x >= kLeastFactor && x <= kMostFactor); };
  if (!in_range(softcap.value_or(0))) {
    throw InvalidArgument(fmt::format("--softcap is {}; it must be 0 (none) or from {} to {}",
                                      *softcap, kLeastFactor, kMostFactor));
  }
  if (!in_range(std::abs(scale.value_or(0)))) {
    throw InvalidArgument(fmt::format("--scale is {}; its magnitude must be 0 or from {} to {}",
                                      *scale, kLeastFactor, kMostFactor));
  }
  options.softcap = softcap.value_or(0);
  options.softmax_scale = scale;
}

}  // namespace zigzag::cli
