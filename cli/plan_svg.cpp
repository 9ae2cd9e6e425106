#include "plan_svg.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include <fmt/format.h>

#include "plan_captions.h"
#include "text.h"

namespace zigzag::cli {
namespace {

constexpr double kWidth = 1000;
constexpr double kMargin = 24;
constexpr double kInner = kWidth - 2 * kMargin;
constexpr std::size_t kMostDocuments = 5;
constexpr std::size_t kFewDocuments = 4;  // shown of more than that
constexpr std::int64_t kMostBands = 256;
constexpr std::int64_t kMostRuns = 1500;
constexpr std::int64_t kMostRankRows = 16;
constexpr double kLabelWidth = 30;  // chunk numbers to the left of a triangle
constexpr double kTitleWidth = 88;  // "document 123456"
constexpr double kGap = 14;         // between two documents
constexpr double kSmallest = 60;
constexpr double kLargest = 430;

// Colours of up to eight ranks, told apart by hue and lightness; more ranks share the hue circle.
std::string colour(std::int64_t rank, std::int64_t colours) {
  constexpr std::array<std::string_view, 8> kPalette{"#2f6db3", "#e08214", "#3f9b57", "#c43d4b",
                                                     "#7d5fb2", "#8a6a52", "#d574ae", "#25a3a8"};
  if (colours <= 8) return std::string(kPalette[static_cast<std::size_t>(rank)]);
  const double hue = 360.0 * static_cast<double>(rank) / static_cast<double>(colours);
  const double h = hue / 60;
  const double light = rank % 2 == 0 ? 0.50 : 0.38;
  const double chroma = (1 - std::abs(2 * light - 1)) * 0.62;
  const double x = chroma * (1 - std::abs(std::fmod(h, 2) - 1));
  const double base = light - chroma / 2;
  const std::array<std::array<double, 3>, 6> sectors{{{chroma, x, 0},
                                                      {x, chroma, 0},
                                                      {0, chroma, x},
                                                      {0, x, chroma},
                                                      {x, 0, chroma},
                                                      {chroma, 0, x}}};
  const auto& rgb = sectors[static_cast<std::size_t>(h) % 6];
  const auto byte = [&](double v) { return static_cast<int>(std::lround(255 * (v + base))); };
  return fmt::format("#{:02x}{:02x}{:02x}", byte(rgb[0]), byte(rgb[1]), byte(rgb[2]));
}

class Picture {
 public:
  Picture(const Plan& plan, const PlanReport& report)
      : plan_(plan), report_(report), ranks_(plan.world_size()) {}

  std::string draw() {
    title();
    documents();
    line_of_tokens();
    rank_bars();
    return fmt::format(
               "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
               "viewBox=\"0 0 {0:.0f} {1:.0f}\" font-family=\"DejaVu Sans, Helvetica, Arial, "
               "sans-serif\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
               kWidth, y_ + kMargin) +
           body_ + "</svg>\n";
  }

 private:
  template <typename... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(body_), format, std::forward<Args>(args)...);
    body_ += '\n';
  }

  void text(double x, double y, double size, std::string_view fill, std::string_view content,
            std::string_view anchor = "start", std::string_view weight = "normal") {
    add("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{:g}\" fill=\"{}\" text-anchor=\"{}\" "
        "font-weight=\"{}\">{}</text>",
        x, y, size, fill, anchor, weight, xml_text(content));
  }

  void heading(std::string_view content, std::string_view explanation) {
    y_ += 38;
    text(kMargin, y_, 15, "#222222", content, "start", "bold");
    if (!explanation.empty()) {
      y_ += 18;
      text(kMargin, y_, 12, "#555555", explanation);
    }
  }

  void title() {
    y_ = kMargin + 16;
    text(kMargin, y_, 20, "#111111",
         fmt::format("{} document{}, {} tokens in all, shared by {} rank{}",
                     count_text(plan_.num_documents()), plan_.num_documents() == 1 ? "" : "s",
                     count_text(plan_.total_tokens()), count_text(ranks_), ranks_ == 1 ? "" : "s"),
         "start", "bold");
    const std::array<std::string, 2> lines{cut_caption(plan_),
                                           owner_caption(plan_, report_.mask, report_.balance)};
    for (const std::string& line : lines) {
      y_ += 18;
      text(kMargin, y_ + 4, 12, "#333333", line);
    }
  }

  // The documents to draw, in pack order: all, or a few from the longest to the shortest.
  std::vector<std::int64_t> chosen_documents() const {
    std::vector<std::int64_t> chosen;
    for (std::int64_t d = 0; d < plan_.num_documents(); ++d) {
      if (plan_.document_length(d) > 0) chosen.push_back(d);
    }
    if (chosen.size() <= kMostDocuments) return chosen;
    std::stable_sort(chosen.begin(), chosen.end(), [&](std::int64_t a, std::int64_t b) {
      return plan_.document_length(a) > plan_.document_length(b);
    });
    std::vector<std::int64_t> few;
    for (std::size_t i = 0; i < kFewDocuments; ++i) {
      few.push_back(chosen[i * (chosen.size() - 1) / (kFewDocuments - 1)]);
    }
    std::sort(few.begin(), few.end());
    return few;
  }

  void documents() {
    const std::vector<std::int64_t> chosen = chosen_documents();
    heading("Who computes what: a row is a query, a column a key that it may see",
            fmt::format("A row has the colour of its rank; numbers are chunks. {}{}",
                        choice_caption(plan_, chosen.size()),
                        chosen.size() > 1 ? "Side: square root of the length." : ""));
    if (chosen.empty()) {
      y_ += 30;
      text(kMargin, y_, 13, "#555555", "The pack holds no token.");
      return;
    }
    std::int64_t longest = 0;
    for (const std::int64_t d : chosen) longest = std::max(longest, plan_.document_length(d));
    std::vector<double> sides(chosen.size());
    for (double largest = kLargest; largest >= kSmallest; largest -= 2) {
      double width = 0;
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        const double share = std::sqrt(static_cast<double>(plan_.document_length(chosen[i])) /
                                       static_cast<double>(longest));
        sides[i] = std::max(kSmallest, largest * share);
        width += kLabelWidth + std::max(kTitleWidth, sides[i]) + (i > 0 ? kGap : 0);
      }
      if (width <= kInner) break;
    }
    y_ += 46;
    double x = kMargin;
    double tallest = 0;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      document(chosen[i], x + kLabelWidth, y_, sides[i]);
      x += kLabelWidth + std::max(kTitleWidth, sides[i]) + kGap;
      tallest = std::max(tallest, sides[i]);
    }
    if (chosen.size() == 1) reading_help(x + 10, y_);
    y_ += tallest;
  }

  // The space beside a single triangle says how to read it.
  void reading_help(double x, double top) {
    const std::array<std::string, 5> lines{
        "How to read it", "- The last row is the last token: it sees the whole document.",
        "- The first row is the first token: it sees only itself.",
        "- The coloured area of a rank is its work, of one small",
        divides_evenly(plan_)
            ? "   and one large chunk: the same area on every rank."
            : fmt::format("   and one large chunk: the mean is {:.4g}% of the largest area.",
                          100 * report_.balance)};
    if (!sees_all_before(report_.mask)) return;
    for (std::size_t i = 0; i < lines.size(); ++i) {
      text(x, top + 14 + 20 * static_cast<double>(i), 12.5, "#333333", lines[i], "start",
           i == 0 ? "bold" : "normal");
    }
  }

  // Visible keys of query rows [begin, end) as a polygon; edges bend where the mask is clipped.
  std::string polygon(double begin, double end, double length, double x, double y,
                      double scale) const {
    const Mask& mask = report_.mask;
    const auto left_of = [&](double row) {
      return mask.window_left < 0 ? 0.0
                                  : std::max(0.0, row - static_cast<double>(mask.window_left));
    };
    const auto right_of = [&](double row) {
      if (mask.causal) return row;
      if (mask.window_right < 0) return length;
      return std::min(length, row + static_cast<double>(mask.window_right));
    };
    std::set<double> rows{begin, end};
    for (const double bend :
         {static_cast<double>(mask.window_left), length - static_cast<double>(mask.window_right)}) {
      if (bend > begin && bend < end) rows.insert(bend);
    }
    std::string points;
    const auto add_point = [&](double column, double row) {
      fmt::format_to(std::back_inserter(points), "{:.2f},{:.2f} ", x + column * scale,
                     y + row * scale);
    };
    for (const double row : rows) add_point(right_of(row), row);
    for (auto row = rows.rbegin(); row != rows.rend(); ++row) add_point(left_of(*row), *row);
    return points;
  }

  void document(std::int64_t d, double x, double y, double side) {
    const auto length = plan_.document_length(d);
    const double scale = side / static_cast<double>(length);
    text(x, y - 20, 11.5, "#222222", fmt::format("document {}", d), "start", "bold");
    text(x, y - 6, 11, "#555555",
         fmt::format("{} token{}", count_text(length), length == 1 ? "" : "s"));
    add("<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" fill=\"#f3f3f3\" "
        "stroke=\"#bbbbbb\" stroke-width=\"0.8\"/>",
        x, y, side, side);
    const std::int64_t chunks = 2 * ranks_;
    const std::int64_t bands = std::min(chunks, kMostBands);
    for (std::int64_t b = 0; b < bands; ++b) {
      // With more chunks than bands, a band shows the chunk that its first row falls into.
      double begin = 0;
      double end = 0;
      std::int64_t index = b;
      if (bands == chunks) {
        const Chunk chunk = plan_.chunk(d, b);
        begin = static_cast<double>(chunk.begin);
        end = static_cast<double>(chunk.end);
      } else {
        begin = static_cast<double>(length) * static_cast<double>(b) / static_cast<double>(bands);
        end = static_cast<double>(length) * static_cast<double>(b + 1) / static_cast<double>(bands);
        const std::int64_t token = plan_.cu_seqlens()[static_cast<std::size_t>(d)] +
                                   std::min(length - 1, static_cast<std::int64_t>(begin));
        index = -1;
        band(polygon(begin, end, static_cast<double>(length), x, y, scale),
             plan_.local_row(token).rank, false);
      }
      if (index < 0 || begin == end) continue;
      const std::int64_t owner = plan_.chunk_owner(index);
      const double height = (end - begin) * scale;
      band(polygon(begin, end, static_cast<double>(length), x, y, scale), owner, height > 4);
      const double size = std::min(12.0, height * 0.85);
      if (size < 6) continue;
      const double middle = y + (begin + end) / 2 * scale + size * 0.36;
      text(x - 5, middle, size, colour(owner, ranks_), fmt::format("{}", index), "end", "bold");
      const Mask& mask = report_.mask;
      const double middle_row = (begin + end) / 2;
      const double right = mask.causal ? middle_row : static_cast<double>(length);
      const double left = mask.window_left < 0
                              ? 0
                              : std::max(0.0, middle_row - static_cast<double>(mask.window_left));
      if (size >= 9 && (right - left) * scale > 62) {
        text(x + (left + right) / 2 * scale, middle, size, "#ffffff", fmt::format("rank {}", owner),
             "middle");
      }
    }
  }

  void band(const std::string& points, std::int64_t owner, bool outlined) {
    add("<polygon points=\"{}\" fill=\"{}\"{}/>", points, colour(owner, ranks_),
        outlined ? " stroke=\"#ffffff\" stroke-width=\"0.7\"" : " shape-rendering=\"crispEdges\"");
  }

  void line_of_tokens() {
    if (plan_.total_tokens() == 0) return;
    heading("The pack as a line of tokens",
            plan_.num_documents() <= 60 ? "Black ticks separate the documents." : "");
    y_ += 10;
    const double total = static_cast<double>(plan_.total_tokens());
    const auto run = [&](double begin, double end, std::int64_t rank) {
      add("<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"26\" fill=\"{}\" "
          "shape-rendering=\"crispEdges\"/>",
          kMargin + kInner * begin / total, y_, kInner * (end - begin) / total,
          colour(rank, ranks_));
    };
    if (report_.segments <= kMostRuns) {
      for (std::int64_t d = 0; d < plan_.num_documents(); ++d) {
        const auto base = static_cast<double>(plan_.cu_seqlens()[static_cast<std::size_t>(d)]);
        for (std::int64_t c = 0; c < 2 * ranks_; ++c) {
          const Chunk chunk = plan_.chunk(d, c);
          if (chunk.begin == chunk.end) continue;
          run(base + static_cast<double>(chunk.begin), base + static_cast<double>(chunk.end),
              plan_.chunk_owner(c));
        }
      }
    } else {
      // More runs than pixels: one stripe a pixel, of the token at its middle.
      const auto pixels = static_cast<std::int64_t>(kInner);
      for (std::int64_t p = 0; p < pixels; ++p) {
        const double begin = total * static_cast<double>(p) / static_cast<double>(pixels);
        const double end = total * static_cast<double>(p + 1) / static_cast<double>(pixels);
        const auto token =
            std::min(static_cast<std::int64_t>((begin + end) / 2), plan_.total_tokens() - 1);
        run(begin, end, plan_.local_row(token).rank);
      }
    }
    if (plan_.num_documents() <= 60) {
      for (const std::int64_t boundary : plan_.cu_seqlens()) {
        const double x = kMargin + kInner * static_cast<double>(boundary) / total;
        add("<line x1=\"{0:.2f}\" x2=\"{0:.2f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\" stroke=\"#000000\" "
            "stroke-width=\"1.2\"/>",
            x, y_ - 5, y_ + 31);
      }
    }
    y_ += 44;
    text(kMargin, y_, 11, "#555555", "token 0");
    text(kMargin + kInner, y_, 11, "#555555", count_text(plan_.total_tokens()), "end");
  }

  void rank_bars() {
    heading("What each rank gets", "");
    y_ += 8;
    const double tokens_x = kMargin + 190;
    const double flops_x = tokens_x + 360;
    const double bar = 210;
    text(tokens_x, y_ + 12, 11.5, "#555555", "tokens");
    text(flops_x, y_ + 12, 11.5, "#555555",
         "work: FLOPs of a forward (share of the busiest rank's)");
    y_ += 20;
    std::int64_t most_tokens = 1;
    double most_flops = 1;
    for (const RankReport& rank : report_.ranks) {
      most_tokens = std::max(most_tokens, rank.tokens);
      most_flops = std::max(most_flops, rank.flops);
    }
    for (std::int64_t r = 0; r < std::min(ranks_, kMostRankRows); ++r) {
      const RankReport& rank = report_.ranks[static_cast<std::size_t>(r)];
      const auto [early, late] = plan_.chunk_indices(r);
      const std::string fill = colour(r, ranks_);
      add("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"14\" height=\"14\" fill=\"{}\"/>", kMargin, y_,
          fill);
      text(kMargin + 22, y_ + 12, 12, "#222222", fmt::format("rank {}", r), "start", "bold");
      text(kMargin + 92, y_ + 12, 12, "#444444", fmt::format("chunks {}, {}", early, late));
      const auto draw_bar = [&](double x, double share, const std::string& label) {
        add("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"14\" fill=\"{}\"/>", x, y_,
            std::max(0.5, bar * share), fill);
        text(x + bar + 8, y_ + 12, 12, "#222222", label);
      };
      draw_bar(tokens_x, static_cast<double>(rank.tokens) / static_cast<double>(most_tokens),
               count_text(rank.tokens));
      draw_bar(flops_x, rank.flops / most_flops,
               fmt::format("{} ({:.2f}%)", scaled_text(rank.flops, "FLOP"),
                           100 * rank.flops / most_flops));
      y_ += 21;
    }
    if (ranks_ > kMostRankRows) {
      const auto [least, most] = std::minmax_element(
          report_.ranks.begin(), report_.ranks.end(),
          [](const RankReport& a, const RankReport& b) { return a.flops < b.flops; });
      y_ += 14;
      text(kMargin, y_, 12, "#444444",
           fmt::format("and {} more ranks; over all of them the least work is {:.3f}% of the most.",
                       count_text(ranks_ - kMostRankRows),
                       100 * least->flops / std::max(most->flops, 1.0)));
    }
    y_ += 2;
  }

  const Plan& plan_;
  const PlanReport& report_;
  std::int64_t ranks_;
  double y_ = 0;
  std::string body_;
};

}  // namespace

std::string plan_svg(const Plan& plan, const PlanReport& report) {
  return Picture(plan, report).draw();
}

}  // namespace zigzag::cli
