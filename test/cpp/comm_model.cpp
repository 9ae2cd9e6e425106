#include "comm_model.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <functional>
#include <numeric>

#include <fmt/format.h>

#include "half.h"

namespace zigzag::test {
namespace {

constexpr std::byte kPoison{0xff};  // NaN in every float type
constexpr std::byte kFence{0x5a};
constexpr std::int64_t kFenceRows = 3;
constexpr std::int64_t kExtraHeads = 3;

std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The element of a tensor at a token: bits that no other place has, NaN patterns included.
std::uint64_t row_bits(int tensor, std::int64_t token) {
  return mix(static_cast<std::uint64_t>(token) * 4 + static_cast<std::uint64_t>(tensor));
}
std::uint64_t element_bits(std::uint64_t row, std::int64_t column) {
  return mix(row + static_cast<std::uint64_t>(column));
}

// A rank's partial of that element: of very different sizes, so that the order of adding shows.
float partial(std::uint64_t row, int rank, std::int64_t column) {
  const std::uint64_t bits =
      mix(row + (static_cast<std::uint64_t>(rank + 1) << 32) + static_cast<std::uint64_t>(column));
  const auto mantissa = static_cast<float>(static_cast<std::int32_t>(bits >> 40)) / 16777216.0f;
  const float sign = (bits & 1) != 0 ? -1.0f : 1.0f;
  return sign * (0.5f + mantissa) *
         std::bit_cast<float>(static_cast<std::uint32_t>(118 + (bits >> 8) % 18) << 23);
}

// Memory of a tensor with fences around it; `view` is what an exchange gets.
struct Tensor {
  std::vector<std::byte> memory;
  TensorView view;

  Tensor(std::int64_t rows, const ExchangeCase& c, DType dtype, Layout layout, std::byte fill) {
    const std::int64_t item = item_size(dtype);
    const std::int64_t heads = c.heads;
    const std::int64_t dim = c.head_dim;
    std::int64_t fence = kFenceRows * heads * dim;
    std::int64_t elements = 0;
    view.dtype = dtype;
    view.shape = {rows, heads, dim};
    switch (layout) {
      case Layout::kContiguous:
        view.strides = {heads * dim, dim, 1};
        elements = rows * heads * dim;
        break;
      case Layout::kHeadSlice:
        view.strides = {(heads + kExtraHeads) * dim, dim, 1};
        elements = rows * (heads + kExtraHeads) * dim;
        fence += dim;
        break;
      case Layout::kPacked:
        view.strides = {2 * heads * dim, dim, 1};
        elements = rows * 2 * heads * dim;
        break;
      case Layout::kTransposed:
        view.strides = {dim, rows * dim, 1};
        elements = rows * heads * dim;
        break;
    }
    memory.assign(static_cast<std::size_t>((elements + 2 * fence) * item), kFence);
    view.data = memory.data() + fence * item;
    each([&](std::int64_t, std::int64_t, std::byte* at) {
      std::memset(at, static_cast<int>(fill), static_cast<std::size_t>(item));
    });
  }

  // Calls f(row, column, place) for every element.
  template <typename F>
  void each(const F& f) {
    const std::int64_t item = item_size(view.dtype);
    const std::int64_t dim = view.shape[2];
    for (std::int64_t row = 0; row < view.shape[0]; ++row) {
      for (std::int64_t head = 0; head < view.shape[1]; ++head) {
        auto* at = static_cast<std::byte*>(view.data) +
                   (row * view.strides[0] + head * view.strides[1]) * item;
        for (std::int64_t i = 0; i < dim; ++i) f(row, head * dim + i, at + i * item);
      }
    }
  }

  // Fills the rows with the elements of these tokens.
  void fill_elements(int tensor, const std::vector<std::int64_t>& tokens) {
    const auto item = static_cast<std::size_t>(item_size(view.dtype));
    each([&](std::int64_t row, std::int64_t column, std::byte* at) {
      const std::uint64_t bits =
          element_bits(row_bits(tensor, tokens[static_cast<std::size_t>(row)]), column);
      std::memcpy(at, &bits, item);
    });
  }
};

std::vector<std::int64_t> gathered_tokens_of(const Plan& plan, int rank, const Mask& mask) {
  std::vector<std::int64_t> tokens;
  for (const KeyRange& range : plan.gathered_ranges(rank, mask)) {
    const std::int64_t start = plan.cu_seqlens()[static_cast<std::size_t>(range.document)];
    for (std::int64_t p = range.begin; p < range.end; ++p) tokens.push_back(start + p);
  }
  return tokens;
}

void put_rounded(std::byte* to, float value, DType dtype) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, sizeof value);
    return;
  }
  const std::uint16_t half = dtype == DType::kFloat16 ? to_float16(value) : to_bfloat16(value);
  std::memcpy(to, &half, sizeof half);
}

// Compares all memory, fences and gaps included.
std::string compare(const Tensor& got, const Tensor& expected, int tensor, int rank,
                    const ExchangeCase& c, const char* what) {
  const auto [a, b] = std::mismatch(got.memory.begin(), got.memory.end(), expected.memory.begin());
  if (a == got.memory.end()) return {};
  const auto wrong =
      std::inner_product(got.memory.begin(), got.memory.end(), expected.memory.begin(),
                         std::int64_t{0}, std::plus<>(), std::not_equal_to<>());
  return fmt::format(
      "{} '{}': rank {} tensor {}: {} of {} bytes differ, the first at {}: {:#x} instead of {:#x}",
      what, c.name, rank, tensor, wrong, got.memory.size(), a - got.memory.begin(),
      static_cast<int>(*a), static_cast<int>(*b));
}

std::vector<TensorView> views(std::vector<Tensor>& tensors) {
  std::vector<TensorView> result;
  for (Tensor& tensor : tensors) result.push_back(tensor.view);
  return result;
}

struct Run {
  Plan plan;
  comm::ExchangeTable table;
  int rank;
  std::vector<std::int64_t> local;     // global tokens of the shard
  std::vector<std::int64_t> gathered;  // and of the gathered buffer

  Run(const Communicator& communicator, const ExchangeCase& c)
      : plan(Plan::from_lengths(c.lengths, communicator.size())),
        table(comm::make_exchange_table(plan, communicator.rank(), c.mask)),
        rank(communicator.rank()),
        local(plan.token_indices(rank)),
        gathered(gathered_tokens_of(plan, rank, c.mask)) {}
};

std::vector<Tensor> run_gather(const Communicator& communicator, const ExchangeCase& c, Run& run) {
  std::vector<Tensor> sources;
  std::vector<Tensor> destinations;
  for (int t = 0; t < c.tensors; ++t) {
    Tensor& source = sources.emplace_back(std::ssize(run.local), c, c.dtype, c.layout, kPoison);
    source.fill_elements(t, run.local);
    destinations.emplace_back(std::ssize(run.gathered), c, c.dtype, Layout::kContiguous, kPoison);
  }
  communicator.transport().gather(views(sources), views(destinations), run.table,
                                  {"gather of K and V", 0, 2}, {});
  // Nobody may read the sources any more: a late reader would see this.
  for (Tensor& source : sources) std::fill(source.memory.begin(), source.memory.end(), kPoison);
  return destinations;
}

std::vector<Tensor> run_reduce(const Communicator& communicator, const ExchangeCase& c, Run& run) {
  std::vector<Tensor> partials;
  std::vector<Tensor> destinations;
  for (int t = 0; t < c.tensors; ++t) {
    Tensor& part = partials.emplace_back(std::ssize(run.gathered), c, DType::kFloat32,
                                         Layout::kContiguous, kPoison);
    part.each([&](std::int64_t row, std::int64_t column, std::byte* at) {
      const std::uint64_t bits = row_bits(t, run.gathered[static_cast<std::size_t>(row)]);
      put_rounded(at, partial(bits, run.rank, column), DType::kFloat32);
    });
    destinations.emplace_back(std::ssize(run.local), c, c.dtype, c.layout, kPoison);
  }
  communicator.transport().reduce(views(partials), views(destinations), run.table,
                                  {"reduction of dK and dV", 1, 2}, {});
  for (Tensor& part : partials) std::fill(part.memory.begin(), part.memory.end(), kPoison);
  return destinations;
}

}  // namespace

std::string check_gather(const Communicator& communicator, const ExchangeCase& c) {
  Run run(communicator, c);
  if (std::ssize(run.gathered) != run.table.gathered_tokens) return "the table's rows are wrong";
  const std::vector<Tensor> got = run_gather(communicator, c, run);
  for (int t = 0; t < c.tensors; ++t) {
    Tensor expected(std::ssize(run.gathered), c, c.dtype, Layout::kContiguous, kPoison);
    expected.fill_elements(t, run.gathered);
    const std::string difference =
        compare(got[static_cast<std::size_t>(t)], expected, t, run.rank, c, "gather");
    if (!difference.empty()) return difference;
  }
  return {};
}

std::string check_reduce(const Communicator& communicator, const ExchangeCase& c) {
  Run run(communicator, c);
  const std::vector<Tensor> got = run_reduce(communicator, c, run);
  // By local row, the ranks that gathered its token.
  std::vector<std::vector<int>> holders(run.local.size());
  for (int r = 0; r < communicator.size(); ++r) {
    auto tokens = gathered_tokens_of(run.plan, r, c.mask);
    std::sort(tokens.begin(), tokens.end());
    for (std::size_t row = 0; row < run.local.size(); ++row) {
      if (std::binary_search(tokens.begin(), tokens.end(), run.local[row])) {
        holders[row].push_back(r);
      }
    }
  }
  for (int t = 0; t < c.tensors; ++t) {
    Tensor expected(std::ssize(run.local), c, c.dtype, c.layout, kPoison);
    expected.each([&](std::int64_t row, std::int64_t column, std::byte* at) {
      const auto r = static_cast<std::size_t>(row);
      const std::uint64_t bits = row_bits(t, run.local[r]);
      float sum = 0;
      for (const int holder : holders[r]) sum += partial(bits, holder, column);
      put_rounded(at, sum, c.dtype);
    });
    const std::string difference =
        compare(got[static_cast<std::size_t>(t)], expected, t, run.rank, c, "reduction");
    if (!difference.empty()) return difference;
  }
  return {};
}

std::uint64_t exchange_digest(const Communicator& communicator, const ExchangeCase& c) {
  Run run(communicator, c);
  std::uint64_t digest = 0;
  for (auto* exchange : {&run_gather, &run_reduce}) {
    for (const Tensor& tensor : exchange(communicator, c, run)) {
      for (const std::byte byte : tensor.memory) {
        digest = mix(digest + static_cast<std::uint64_t>(byte));
      }
    }
  }
  return digest;
}

std::vector<ExchangeCase> exchange_cases(int size) {
  const std::int64_t w = size;
  const Mask full{false, -1, -1};
  const Mask window{true, 16, -1};
  const Mask both{false, 3, 5};
  const Mask self_only{true, 0, -1};
  const std::vector<std::int64_t> edges = {0, 1, 2, 2 * w - 1, 2 * w, 2 * w + 1, 127, 128, 129, 0};
  std::vector<std::int64_t> short_ones;
  for (std::int64_t i = 0; i < 300; ++i) short_ones.push_back((i * 7) % 10);
  std::vector<std::int64_t> mixed = {1031, 3, 0, 257};
  mixed.insert(mixed.end(), short_ones.begin(), short_ones.begin() + 50);

  std::vector<ExchangeCase> cases = {
      {.name = "the empty pack", .lengths = {}},
      {.name = "one empty document", .lengths = {0}},
      {.name = "one token", .lengths = {1}, .mask = full},
      {.name = "edges", .lengths = edges},
      {.name = "edges, full", .lengths = edges, .mask = full},
      {.name = "edges, window", .lengths = edges, .mask = window},
      {.name = "edges, two-sided window", .lengths = edges, .mask = both},
      {.name = "edges, own position only", .lengths = edges, .mask = self_only},
      {.name = "hundreds of short ones", .lengths = short_ones},
      {.name = "short ones, full", .lengths = short_ones, .mask = full},
      {.name = "one long", .lengths = {4099}, .heads = 1, .head_dim = 16},
      {.name = "one long, window", .lengths = {4099}, .mask = window, .heads = 1},
      {.name = "mixed", .lengths = mixed, .tensors = 1},
  };
  // Big enough to need several rounds of scratch memory; the slowest cases, so not at every size.
  const bool rounds = size == 2 || size == 8;
  if (rounds) {
    cases.insert(cases.end(),
                 {
                     {.name = "many rounds", .lengths = {700, 200, 7}, .heads = 16, .head_dim = 64},
                     {.name = "many rounds, window",
                      .lengths = {700, 200},
                      .mask = window,
                      .heads = 16,
                      .head_dim = 64},
                 });
  }
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    cases.push_back({.name = "mixed, half types", .lengths = mixed, .dtype = dtype});
  }
  for (const Layout layout : {Layout::kHeadSlice, Layout::kPacked, Layout::kTransposed}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      cases.push_back({.name = fmt::format("mixed, layout {}", static_cast<int>(layout)),
                       .lengths = mixed,
                       .dtype = dtype,
                       .layout = layout});
    }
    if (!rounds) continue;
    cases.push_back({.name = fmt::format("many rounds, layout {}", static_cast<int>(layout)),
                     .lengths = {600, 100},
                     .heads = 16,
                     .head_dim = 64,
                     .layout = layout});
  }
  return cases;
}

}  // namespace zigzag::test
