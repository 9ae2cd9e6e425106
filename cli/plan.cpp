#include "zigzag/plan.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include <fmt/format.h>

#include "command.h"
#include "io/atomic_file.h"
#include "pack_options.h"
#include "plan_report.h"
#include "plan_svg.h"
#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

struct Options {
  PackOptions pack;
  ShapeOptions shape;
  MaskOptions mask;
  std::int64_t ranks = 0;
  std::optional<double> tflops;
  std::optional<double> gbps;
  bool json = false;
  bool segments = false;
  std::string svg;
};

std::optional<CostModel> cost_model(const Options& options) {
  if (!options.tflops && !options.gbps) return std::nullopt;
  if (!options.tflops || !options.gbps) {
    throw InvalidArgument(fmt::format("{} is given without {}; a prediction needs both",
                                      options.tflops ? "--tflops" : "--gbps",
                                      options.tflops ? "--gbps" : "--tflops"));
  }
  if (*options.tflops <= 0) {
    throw InvalidArgument(fmt::format("--tflops is {}; it must be positive", *options.tflops));
  }
  if (*options.gbps <= 0) {
    throw InvalidArgument(fmt::format("--gbps is {}; it must be positive", *options.gbps));
  }
  return CostModel{*options.tflops, *options.gbps};
}

int run_plan(const Options& options) {
  options.pack.check();
  options.shape.check();
  const Mask mask = options.mask.mask();
  const std::optional<CostModel> model = cost_model(options);
  if (options.ranks == 0) {
    throw InvalidArgument("--ranks is missing; give the number of ranks, at least 1");
  }
  if (!options.svg.empty()) io::check_writable(options.svg, "--svg");
  PackLengths pack = read_lengths(options.pack);
  const Plan plan(pack.cu_seqlens, options.ranks);
  const PlanReport report = make_report(plan, options.shape, mask, model, std::move(pack.notes));
  if (!options.svg.empty()) {
    const std::string svg = plan_svg(plan, report);
    io::AtomicFile file(options.svg);
    file.write_at(0, std::as_bytes(std::span(svg)));
    file.commit();
  }
  if (options.json) {
    print_json(plan, report, options.segments);
  } else {
    print_table(plan, report, options.segments);
    if (!options.svg.empty()) fmt::print("\nPicture written to {}\n", options.svg);
  }
  return kExitOk;
}

}  // namespace

void add_plan(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "plan", "Show the layout of a pack: chunks, tokens, FLOPs and traffic of each rank");
  auto options = std::make_shared<Options>();
  Flags flags(*command);
  options->pack.declare(flags);
  flags.group("Ranks");
  flags.integer("--ranks", options->ranks, 1, Plan::kMaxWorldSize, "Ranks that share the pack")
      ->default_str("");
  options->shape.declare(flags);
  options->mask.declare(flags);
  flags.group("Prediction");
  flags.number("--tflops", options->tflops, "Sustained attention rate of one rank, TFLOP/s");
  flags.number("--gbps", options->gbps, "Rate at which one rank receives, GB/s");
  flags.group("Output");
  flags.toggle("--json", options->json, "Print one JSON object");
  flags.toggle("--segments", options->segments,
               "List all segments: above 16 documents or ranks too; with --json, above 10,000 too");
  flags.text("--svg", options->svg, "FILE", "Draw who owns what over the causal triangles");
  command->footer(
      "Examples:\n"
      "  zigzag plan --lengths 512,1024,768 --ranks 4\n"
      "  zigzag plan --lengths 100000,30000 --ranks 8 --heads 64 --kv-heads 8 --head-dim 128 \\\n"
      "      --dtype bfloat16 --tflops 400 --gbps 50\n"
      "  zigzag plan --documents README.md include --ranks 3 --svg plan.svg --json");
  command->callback([options, &action] { action = [options] { return run_plan(*options); }; });
}

}  // namespace zigzag::cli
