#pragma once

#include <cstddef>
#include <string>

#include "zigzag/plan.h"

namespace zigzag::cli {

/// Whether the chunks of every document are equally long.
bool divides_evenly(const Plan& plan);

/// Whether a later query sees all that an earlier one sees, and more: a triangle.
bool sees_all_before(const Mask& mask);

/// How documents are cut, and how many tokens a rank gets.
std::string cut_caption(const Plan& plan);

/// Which chunks a rank owns, under which mask, and how well the work is balanced.
std::string owner_caption(const Plan& plan, const Mask& mask, double balance);

/// Which documents are drawn when `shown` of them are; empty when all are.
std::string choice_caption(const Plan& plan, std::size_t shown);

}  // namespace zigzag::cli
