#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/transport.h"
#include "zigzag/communicator.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

// A naive model of gather and reduction, and the checks that one rank of any group makes with it.
// The model asks the plan only which global tokens a rank holds and gathers, never for segments.
namespace zigzag::test {

/// How the rows of a shard lie in memory.
enum class Layout {
  kContiguous,  // [tokens, heads, head_dim]
  kHeadSlice,   // some heads of wider rows
  kPacked,      // one of two tensors interleaved by row, as in kv-packed storage
  kTransposed,  // [heads, tokens, head_dim] seen as [tokens, heads, head_dim]
};

struct ExchangeCase {
  std::string name = {};
  std::vector<std::int64_t> lengths = {};
  Mask mask = {};
  DType dtype = DType::kFloat32;
  std::int64_t heads = 2;
  std::int64_t head_dim = 8;
  Layout layout = Layout::kContiguous;
  int tensors = 2;
};

/// Packs, masks, types and layouts that every transport is tested on, for a group of this size.
std::vector<ExchangeCase> exchange_cases(int size);

/// Gathers on this rank and compares every byte, and the bytes around, with the model. Returns the
/// first difference, or nothing.
std::string check_gather(const Communicator& communicator, const ExchangeCase& c);

/// The same for a reduction of float32 partials.
std::string check_reduce(const Communicator& communicator, const ExchangeCase& c);

/// A hash of what gather and reduction wrote on this rank, to compare transports bit by bit.
std::uint64_t exchange_digest(const Communicator& communicator, const ExchangeCase& c);

}  // namespace zigzag::test
