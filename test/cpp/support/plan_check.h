#pragma once

#include <string>
#include <vector>

#include "support/packs.h"
#include "zigzag/plan.h"

namespace zigzag::test {

/// Masks of every kind: causal, full, windows to one side and to both, narrow and wide.
const std::vector<Mask>& all_masks();

std::string mask_text(const Mask& mask);

/// Says whether query position i sees key position j, in its own words.
bool sees(const Mask& mask, std::int64_t i, std::int64_t j);

// Each returns the first broken rule, or nothing.

/// Chunks, local counts, local cu_seqlens, token indices, position ids, both lookups, the seed's
/// formula for divisible lengths, the identity of one rank.
std::string check_layout(const Plan& plan, const Lengths& lengths);

/// Work items against visibility by definition, gathered rows, segments, pair counts, and each
/// `_all` answer against the ranks' own.
std::string check_work(const Plan& plan, const Lengths& lengths, const Mask& mask);

/// Pieces of the causal backward: every visible pair once, nothing else.
std::string check_pieces(const Plan& plan, const Lengths& lengths);

/// The causal work of ranks differs by at most two pairs for each token of the documents whose
/// length 2W does not divide. docs/layout.md derives it.
std::string check_balance(const Plan& plan, const Lengths& lengths);

}  // namespace zigzag::test
