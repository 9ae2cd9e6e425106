#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>

#include <fmt/format.h>

#include "agreement.h"
#include "attention_check.h"
#include "check.h"
#include "command.h"
#include "group.h"
#include "pack_source.h"
#include "process_memory.h"
#include "run_report.h"
#include "text.h"
#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

struct Options {
  PackOptions pack;
  ShapeOptions shape;
  MaskOptions mask;
  GroupOptions group;
  std::int64_t kv_heads_per_stage = 0;
  std::string kernels;
  bool deterministic = false;
  bool backward = false;
  bool forward_only = false;
  bool check = false;
  std::string output;
  bool json = false;
};

AttentionOptions attention_options(const Options& options) {
  AttentionOptions attention;
  options.mask.apply(attention);
  attention.kernels = options.kernels.empty() ? default_kernels() : parse_kernels(options.kernels);
  attention.kv_heads_per_stage = options.kv_heads_per_stage;
  attention.deterministic = options.deterministic;
  return attention;
}

// What the library would refuse later is refused here, before anything is read or drawn.
void check_job(const Options& options, const PackSource& source) {
  const io::ModelShape& shape = source.shape();
  if (shape.head_dim > kMaxHeadDim) {
    throw InvalidArgument(
        fmt::format("head_dim is {}; attention takes 1 to {}", shape.head_dim, kMaxHeadDim));
  }
  const std::int64_t stage = options.kv_heads_per_stage;
  if (stage > 0 && shape.kv_heads % stage != 0) {
    throw InvalidArgument(
        fmt::format("--kv-heads-per-stage is {}; it must be auto or a divisor of the {} KV heads",
                    stage, shape.kv_heads));
  }
  if (!options.output.empty()) {
    io::check_writable(options.output, "--output");
    std::error_code error;
    if (!options.pack.input.empty() &&
        std::filesystem::equivalent(options.output, options.pack.input, error)) {
      throw InvalidArgument(
          fmt::format("--output '{}' is the input; name another file", options.output));
    }
    for (const std::string& document : options.pack.documents) {
      if (std::filesystem::equivalent(options.output, document, error)) {
        throw InvalidArgument(fmt::format(
            "--output '{}' is one of the documents; name another file", options.output));
      }
    }
  }
}

const char* source_name(const PackOptions& pack) {
  if (!pack.input.empty()) return "--input";
  return pack.documents.empty() ? "--lengths or --lengths-file" : "--documents";
}

// Processes started with different flags or files would exchange rows that do not belong together,
// or wait for each other.
void check_agreement(const Options& options, const PackSource& source, std::uint64_t contents,
                     const AttentionOptions& attention, bool backward, const Group& group) {
  if (!group.is_mpi()) return;
  const io::ModelShape& shape = source.shape();
  const Mask& mask = attention.mask;
  const std::vector<std::int64_t>& ends = source.cu_seqlens();
  Fingerprint pack;
  pack.add(std::as_bytes(std::span(ends)));
  const auto text = [](const auto& value) { return fmt::format("{}", value); };
  agree_on(
      group,
      {{"version", std::string(version())},
       {"--device", group.device()},
       {"--comm", group.comm()},
       {"a pack from", source_name(options.pack)},
       {"--max-tokens", text(options.pack.max_tokens)},
       {"--heads", text(shape.heads)},
       {"--kv-heads", text(shape.kv_heads)},
       {"--head-dim", text(shape.head_dim)},
       {"--dtype", std::string(dtype_name(source.dtype()))},
       {"--seed", text(options.pack.seed)},
       {"--causal", text(mask.causal)},
       {"--window", fmt::format("{},{}", mask.window_left, mask.window_right)},
       {"--softcap", text(attention.softcap)},
       {"--scale", options.mask.scale ? text(*options.mask.scale) : "1/sqrt(head_dim)"},
       {"--kernels", std::string(kernels_name(*attention.kernels))},
       {"--kv-heads-per-stage", text(attention.kv_heads_per_stage)},
       {"--deterministic", text(attention.deterministic)},
       {"a backward (--backward, --forward-only, dout of --input):", text(backward)},
       {"--check", text(options.check)},
       {"--json", text(options.json)},
       {"--output", options.output.empty() ? "nowhere" : options.output},
       {"a pack of", fmt::format("{} tokens in {} documents with lengths of fingerprint {:016x}",
                                 ends.back(), ends.size() - 1, pack.value())},
       {"documents or tensors with contents of fingerprint", fmt::format("{:016x}", contents)}});
}

void check_memory(const Job& job, const Group& group) {
  const MemoryReport memory =
      measure_memory(job, group, std::vector<RankTimes>(static_cast<std::size_t>(group.size())));
  double needed = memory.inputs + memory.results + memory.gathered + memory.partials;
  if (job.keep_results && group.is_root()) {
    // The whole results, the same of one rank with its inputs, and a float64 reference.
    needed = std::max(needed, memory.results) +
             memory.whole * (2 + 8.0 / static_cast<double>(item_size(job.source->dtype())));
  }
  const double available = machine_memory_bytes();
  if (available > 0 && needed > available) {
    throw EnvironmentError(fmt::format(
        "this run needs about {} of memory and the machine has {}; use fewer tokens, heads, a "
        "smaller --head-dim{}",
        bytes_text(needed), bytes_text(available),
        job.keep_results ? " or leave out --check" : ""));
  }
}

int run(const Options& options) {
  options.pack.check();
  if (options.backward && options.forward_only) {
    throw InvalidArgument("--backward and --forward-only contradict each other; give one of them");
  }
  const AttentionOptions attention = attention_options(options);
  const std::unique_ptr<PackSource> source = open_source(options.pack, options.shape);
  check_job(options, *source);
  const bool backward = !options.forward_only && (options.backward || source->wants_backward());
  // Read while a file that fails is still this process's own matter: nobody waits for it yet.
  const std::uint64_t contents = launched_processes() > 1 ? source->contents() : 0;
  const Group group(options.group);
  check_agreement(options, *source, contents, attention, backward, group);
  const Plan plan(source->cu_seqlens(), group.size());

  Job job;
  job.source = source.get();
  job.plan = &plan;
  job.attention = attention;
  job.backward = backward;
  job.keep_results = options.check;
  job.output = options.output;
  check_memory(job, group);

  Progress progress(group.is_root());
  RunReport report;
  report.job = &job;
  report.group = &group;
  std::unique_ptr<io::SafetensorsWriter> writer;
  JobResult result = run_job(job, group, progress, writer);
  if (!group.is_root()) return kExitOk;
  report.times = std::move(result.times);
  report.memory = measure_memory(job, group, report.times);
  if (options.check) {
    report.check = check_results(job, result.results, group.device_of(0), progress);
  }
  const bool passed = !report.check || report.check->passed;
  // Results that failed their check take no name: what stood there before stays.
  if (writer && passed) writer->commit();
  if (options.json) {
    print_run_json(report);
  } else {
    print_run_summary(report);
  }
  if (!passed) say("zigzag: the check failed: a difference exceeds its bound");
  return passed ? kExitOk : kExitCheckFailed;
}

}  // namespace

void add_run(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "run", "Exact attention, forward and backward, over the ranks; optionally checked");
  auto options = std::make_shared<Options>();
  Flags flags(*command);
  options->pack.declare(flags);
  options->pack.declare_data(flags);
  options->group.declare(flags);
  options->shape.declare(flags);
  options->mask.declare(flags);
  options->mask.declare_scores(flags);
  flags.group("Engine");
  flags.integer_or("--kv-heads-per-stage", options->kv_heads_per_stage, "auto", 0, 1,
                   std::numeric_limits<std::int64_t>::max(),
                   "KV heads gathered at a time, a divisor of the KV heads");
  flags.choice("--kernels", options->kernels, {"fused", "reference"},
               "Which twin of the kernels runs [ZIGZAG_KERNELS, else fused]");
  flags.toggle("--deterministic", options->deterministic,
               "On cuda: a bitwise repeatable backward (the CPU always is)");
  flags.toggle("--backward", options->backward,
               "With --input without dout: draw dout from the seed and run the backward too");
  flags.toggle("--forward-only", options->forward_only, "No backward");
  flags.group("Output");
  flags.toggle("--check", options->check,
               "Compare with the float64 reference and with one rank; exit 1 beyond the bounds");
  flags.text("--output", options->output, "FILE.safetensors",
             "Write out, lse and the gradients in global order");
  flags.toggle("--json", options->json, "Print one JSON object");
  command->footer(
      "Examples:\n"
      "  zigzag run --documents README.md LICENSE --ranks 4 --check\n"
      "  zigzag run --lengths 4096,1000,0,77 --ranks 3 --heads 6 --kv-heads 3 --dtype bfloat16 \\\n"
      "      --check --json\n"
      "  zigzag run --input qkv.safetensors --ranks 2 --output out.safetensors\n"
      "  mpirun -n 2 zigzag run --comm mpi --lengths 8192 --check");
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace zigzag::cli
