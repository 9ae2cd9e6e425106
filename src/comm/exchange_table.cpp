#include <algorithm>

#include "comm/transport.h"

namespace zigzag::comm {

ExchangeTable make_exchange_table(const Plan& plan, std::int64_t rank, const Mask& mask) {
  const std::int64_t size = plan.world_size();
  ExchangeTable table;
  table.receives.reserve(static_cast<std::size_t>(size));
  table.sends.reserve(static_cast<std::size_t>(size));
  for (std::int64_t peer = 0; peer < size; ++peer) {
    table.receives.push_back(plan.gather_segments(rank, peer, mask));
    table.sends.push_back(plan.gather_segments(peer, rank, mask));
    table.max_local_tokens = std::max(table.max_local_tokens, plan.local_tokens(peer));
  }
  table.local_tokens = plan.local_tokens(rank);
  table.gathered_tokens = plan.gathered_tokens(rank, mask);
  return table;
}

}  // namespace zigzag::comm
