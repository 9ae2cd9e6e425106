#include <memory>
#include <vector>

#include <fmt/format.h>

#include "bench_common.h"
#include "command.h"
#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

void add_benchmark(CLI::App& bench, Action& action, const std::string& name,
                   const std::string& description, const BenchOptions& defaults,
                   int (*run)(const BenchOptions&), const std::string& footer) {
  CLI::App* command = bench.add_subcommand(name, description);
  auto options = std::make_shared<BenchOptions>(defaults);
  Flags flags(*command);
  options->declare(flags, run == bench_attention);
  if (run == bench_attention) {
    flags.text("--timeline", options->timeline, "FILE",
               "Write what the GPUs did in one forward and backward, as Chrome trace JSON");
  }
  command->footer(footer);
  command->callback([=, &action] {
    action = [=] {
      if (const std::int64_t processes = launched_processes(); processes > 1) {
        throw InvalidArgument(
            fmt::format("bench {} runs all its ranks in one process, and {} were started together; "
                        "start it without mpirun",
                        name, processes));
      }
      return run(*options);
    };
  });
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* bench = app.add_subcommand("bench", "Timings, verified: layout, attention, plan");
  bench->require_subcommand(0, 1);
  bench->footer(
      "Each takes the same options; --device, --comm and --timeline are attention's alone.\n"
      "All ranks are of one process: start it without mpirun. docs/cli.md defines the columns.\n"
      "#wrong counts elements that differ from what they are compared with by more than allowed:\n"
      "0 is right.\n\n"
      "Examples:\n"
      "  zigzag bench layout\n"
      "  zigzag bench attention --lengths 4096 --head-dim 128 --ranks 4 --json\n"
      "  zigzag bench plan --ranks 1024");
  BenchOptions layout;
  layout.shape.kv_heads = 8;
  layout.shape.head_dim = 128;
  layout.shape.dtype = "bfloat16";
  layout.group.ranks = 8;
  add_benchmark(*bench, action, "layout",
                "shard, unshard, extract and scatter against memcpy and their plain twins", layout,
                bench_layout,
                "Tensors are [tokens, kv_heads, head_dim].\n\n"
                "Examples:\n"
                "  zigzag bench layout\n"
                "  zigzag bench layout --lengths 512,1024,768 --kv-heads 4 --ranks 4 --threads 1");
  BenchOptions attention;
  attention.group.ranks = 4;
  attention.shape.head_dim = 128;
  attention.repeat = 5;
  add_benchmark(
      *bench, action, "attention",
      "Forward and backward over the ranks, against one rank and the FMA peak", attention,
      bench_attention,
      "Examples:\n"
      "  zigzag bench attention --lengths 4096 --ranks 4\n"
      "  zigzag bench attention --lengths 2048 --head-dim 64 --dtype bfloat16 --repeat 9\n"
      "  zigzag bench attention --device cuda --dtype bfloat16 --ranks 2 --timeline step.json");
  BenchOptions plan;
  plan.group.ranks = 1024;
  plan.repeat = 3;
  add_benchmark(*bench, action, "plan", "Time and memory of planning a huge pack", plan, bench_plan,
                "Without a source of documents: a million drawn from the seed.\n\n"
                "Examples:\n"
                "  zigzag bench plan\n"
                "  zigzag bench plan --lengths 1000000000000 --ranks 8192 --json");
  bench->callback([bench, &action] {
    if (bench->get_subcommands().empty()) {
      action = []() -> int {
        throw InvalidArgument(
            "a benchmark is missing; layout, attention and plan are there (zigzag bench --help)");
      };
    }
  });
}

}  // namespace zigzag::cli
