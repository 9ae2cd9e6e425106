#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "check.h"
#include "command.h"
#include "cuda/runtime.h"
#include "group.h"
#include "isolated.h"
#include "process_memory.h"
#include "run_job.h"
#include "text.h"
#include "zigzag/error.h"
#include "zigzag/system.h"
#include "zigzag_build_info.h"

namespace zigzag::cli {
namespace {

constexpr unsigned kSeconds = 60;

// One way to run attention that the doctor tries.
struct Trial {
  std::string name;
  std::string device;
  std::string comm;
  std::int64_t ranks;
  std::string dtype;
  std::string kernels;
};

struct Verdict {
  std::string name;
  std::string status;  // "passed", "failed", "not available"
  std::string detail;
};

std::vector<Trial> host_trials() {
  return {{"cpu, 1 rank", "cpu", "threads", 1, "float32", "fused"},
          {"cpu, 2 rank threads, float32", "cpu", "threads", 2, "float32", "fused"},
          {"cpu, 2 rank threads, bfloat16", "cpu", "threads", 2, "bfloat16", "fused"},
          {"cpu, 2 rank threads, float16", "cpu", "threads", 2, "float16", "fused"},
          {"cpu, reference kernels", "cpu", "threads", 2, "float32", "reference"}};
}

std::vector<Trial> gpu_trials() {
  return {{"cuda, 1 rank, bfloat16", "cuda", "peer", 1, "bfloat16", "fused"},
          {"cuda, 1 rank, float32", "cuda", "peer", 1, "float32", "fused"},
          {"cuda, 2 ranks over peer memory", "cuda", "peer", 2, "bfloat16", "fused"},
          {"cuda, 2 ranks over NCCL", "cuda", "nccl", 2, "bfloat16", "fused"}};
}

// Forward and backward of a tiny pack against the float64 reference: a sentence, or an exception.
std::string attempt(const Trial& trial, bool alone) {
  PackOptions pack;
  pack.lengths = "33,0,5,64,1";
  ShapeOptions shape;
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = 32;
  shape.dtype = trial.dtype;
  GroupOptions options;
  options.ranks = trial.ranks;
  options.device = trial.device;
  options.comm = trial.comm;
  options.alone = alone;
  const std::unique_ptr<PackSource> source = open_source(pack, shape);
  const Group group(options);
  const Plan plan(source->cu_seqlens(), group.size());
  Job job;
  job.source = source.get();
  job.plan = &plan;
  job.attention.kernels = parse_kernels(trial.kernels);
  job.keep_results = true;
  Progress silent(false);
  std::unique_ptr<io::SafetensorsWriter> no_writer;
  const JobResult result = run_job(job, group, silent, no_writer);
  if (!group.is_root()) return "";
  const CheckReport check = check_results(job, result.results, group.device_of(0), silent);
  if (!check.passed) {
    throw std::runtime_error("the results differ from the float64 reference by more than allowed");
  }
  return fmt::format("forward and backward agree with the float64 reference ({}, {})",
                     plural(group.size(), "rank"), group.comm());
}

Verdict judge(const Trial& trial) {
  const Isolated result = run_isolated([&] { return attempt(trial, true); }, kSeconds);
  return {trial.name, result.finished ? "passed" : "failed", result.text};
}

// MPI cannot be tried in a child process: only under mpirun, in this one.
Verdict judge_mpi() {
  const std::string name = "cpu, MPI processes";
  if (!comm::has_mpi()) return {name, "not available", comm::mpi_description()};
  if (!comm::started_by_mpi_launcher()) {
    return {name, "not available", "not tried; start it as 'mpirun -n 2 zigzag doctor'"};
  }
  try {
    return {name, "passed", attempt({name, "cpu", "mpi", 0, "float32", "fused"}, false)};
  } catch (const std::exception& error) {
    return {name, "failed", error.what()};
  }
}

int gpus() {
  const Isolated count =
      run_isolated([] { return fmt::format("{}", cuda::device_count()); }, kSeconds);
  return count.finished ? std::atoi(count.text.c_str()) : 0;
}

std::vector<Verdict> judge_all() {
  std::vector<Verdict> verdicts;
  for (const Trial& trial : host_trials()) verdicts.push_back(judge(trial));
  const int devices = gpus();
  for (const Trial& trial : gpu_trials()) {
    if (devices == 0) {
      verdicts.push_back({trial.name, "not available", "no GPU can be used"});
    } else if (trial.comm == "nccl" && devices < 2) {
      verdicts.push_back({trial.name, "not available", "NCCL needs a GPU a rank; there is one"});
    } else {
      verdicts.push_back(judge(trial));
    }
  }
  return verdicts;
}

nlohmann::ordered_json components_json() {
  const Isolated found = run_isolated(
      [] {
        auto list = nlohmann::ordered_json::array();
        for (const Component& component : components()) {
          list.push_back({{"name", component.name},
                          {"available", component.available},
                          {"detail", component.detail}});
        }
        return list.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
      },
      kSeconds);
  if (found.finished) return nlohmann::ordered_json::parse(found.text);
  return {{{"name", "components"}, {"available", false}, {"detail", found.text}}};
}

nlohmann::ordered_json examine() {
  nlohmann::ordered_json json;
  json["version"] = version();
  json["build"] = {{"type", build_info::kBuildType},         {"compiler", build_info::kCompiler},
                   {"sanitizers", build_info::kSanitizers},  {"mpi", build_info::kMpi},
                   {"mpi_reason", build_info::kMpiReason},   {"cuda", build_info::kCuda},
                   {"cuda_reason", build_info::kCudaReason}, {"nccl", build_info::kNccl},
                   {"nccl_reason", build_info::kNcclReason}};
  json["memory_bytes"] = machine_memory_bytes();
  auto variables = nlohmann::ordered_json::object();
  for (const char* name :
       {"ZIGZAG_KERNELS", "ZIGZAG_NUM_THREADS", "ZIGZAG_TIMEOUT_S", "ZIGZAG_CPU_TARGET",
        "ZIGZAG_CUDNN_PATH", "ZIGZAG_NCCL_PATH", "ZIGZAG_CUDART_PATH", "ZIGZAG_NVRTC_PATH",
        "ZIGZAG_GPU_COMM", "ZIGZAG_GPU_ENGINE", "ZIGZAG_PEER_COPY"}) {
    const char* value = std::getenv(name);
    if (value != nullptr) variables[name] = value;
  }
  json["environment"] = variables;
  const std::vector<Verdict> verdicts = judge_all();
  json["components"] = components_json();
  auto checks = nlohmann::ordered_json::array();
  for (const Verdict& v : verdicts) {
    checks.push_back({{"name", v.name}, {"status", v.status}, {"detail", v.detail}});
  }
  const Verdict mpi = judge_mpi();
  checks.push_back({{"name", mpi.name}, {"status", mpi.status}, {"detail", mpi.detail}});
  json["self_checks"] = checks;
  return json;
}

// A component of every machine that cannot be used, as with a wrong environment variable; the
// others may be absent.
bool is_broken(const nlohmann::ordered_json& component) {
  const std::string name = component["name"].get<std::string>();
  const bool everywhere = name == "CPU" || name == "threads" || name == "components";
  return everywhere && !component["available"].get<bool>();
}

void print_report(const nlohmann::ordered_json& json) {
  const auto text = [](const nlohmann::ordered_json& value) { return value.get<std::string>(); };
  const auto& build = json["build"];
  fmt::print("zigzag {}\n\nBuild\n", text(json["version"]));
  fmt::print("  {} build by {}{}\n", text(build["type"]), text(build["compiler"]),
             text(build["sanitizers"]).empty() ? "" : ", sanitizers " + text(build["sanitizers"]));
  for (const char* name : {"mpi", "cuda", "nccl"}) {
    std::string upper = name;
    for (char& c : upper) c = static_cast<char>(std::toupper(c));
    fmt::print("  {}: {} ({})\n", upper, build[name].get<bool>() ? "yes" : "no",
               text(build[std::string(name) + "_reason"]));
  }
  fmt::print("\nMachine\n  {} of memory\n", bytes_text(json["memory_bytes"].get<double>()));
  for (const auto& component : json["components"]) {
    fmt::print("  {:<4} {}: {}\n",
               component["available"].get<bool>() ? "ok"
               : is_broken(component)             ? "FAIL"
                                                  : "--",
               text(component["name"]), text(component["detail"]));
  }
  if (!json["environment"].empty()) {
    fmt::print("\nEnvironment\n");
    for (const auto& [name, value] : json["environment"].items()) {
      fmt::print("  {}={}\n", name, text(value));
    }
  }
  fmt::print("\nSelf-checks\n");
  for (const auto& check : json["self_checks"]) {
    const std::string status = text(check["status"]);
    fmt::print("  {:<4} {}: {}\n",
               status == "passed"   ? "ok"
               : status == "failed" ? "FAIL"
                                    : "--",
               text(check["name"]), text(check["detail"]));
  }
}

int run_doctor(bool as_json) {
  const nlohmann::ordered_json json = examine();
  bool failed = false;
  for (const auto& component : json["components"]) failed = failed || is_broken(component);
  for (const auto& check : json["self_checks"]) failed = failed || check["status"] == "failed";
  // Under mpirun every process examines itself and one of them speaks.
  if (speaks()) {
    if (as_json) {
      fmt::print("{}\n", json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
    } else {
      print_report(json);
    }
  }
  return failed ? kExitCheckFailed : kExitOk;
}

}  // namespace

void add_doctor(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "doctor", "What this build and machine offer, and a tiny self-check of every part");
  auto json = std::make_shared<bool>(false);
  Flags flags(*command);
  flags.group("Output");
  flags.toggle("--json", *json, "Print one JSON object");
  command->footer(
      "Prints whatever is broken; exit code 1 when a part that is there fails its check.\n\n"
      "Examples:\n"
      "  zigzag doctor\n"
      "  zigzag doctor --json\n"
      "  mpirun -n 2 zigzag doctor");
  command->callback([json, &action] { action = [json] { return run_doctor(*json); }; });
}

}  // namespace zigzag::cli
