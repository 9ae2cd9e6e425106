#pragma once

#include <string>

#include "plan_report.h"
#include "zigzag/plan.h"

namespace zigzag::cli {

/// An SVG picture of a plan: the visible (query, key) pairs of up to five documents, coloured by
/// the rank that owns the query row; the pack as a line of tokens; tokens and FLOPs of the ranks.
/// Its size is bounded whatever the pack.
std::string plan_svg(const Plan& plan, const PlanReport& report);

}  // namespace zigzag::cli
