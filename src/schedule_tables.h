#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "comm/transport.h"
#include "zigzag/plan.h"

namespace zigzag {

/// What the schedule needs of a plan for one rank and mask. Every layer of a model asks for the
/// same, so they are kept.
struct ScheduleTables {
  std::vector<WorkItem> items;
  comm::ExchangeTable exchange;
};

/// The tables, built on the first call and kept for the most recent packs. Safe to call from any
/// thread.
std::shared_ptr<const ScheduleTables> schedule_tables(const Plan& plan, std::int64_t rank,
                                                      const Mask& mask);

}  // namespace zigzag
