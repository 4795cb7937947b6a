// SPDX-License-Identifier: Apache-2.0
//
// zerodctl: looks at a daemon of this node, and tells it what to do.
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "client/ctl/configs.h"
#include "client/ctl/models.h"
#include "client/ctl/plans.h"
#include "client/ctl/rpc.h"
#include "client/ctl/tables.h"

namespace zerod::ctl {
namespace {

struct Arguments {
  std::string address;
  bool json = false;
  bool once = false;
  double interval_seconds = 1;
  std::string job;
  CheckConfigArguments check;
  PlanArguments plan;
};

std::string DefaultAddress() {
  const char* const address = std::getenv("ZEROD_ADDRESS");
  return address != nullptr && address[0] != 0 ? address : "unix:/run/zerod/zerod.sock";
}

absl::Status Status(Daemon* daemon, const Arguments& arguments) {
  auto status = daemon->Status();
  if (!status.ok()) return status.status();
  std::fputs((arguments.json ? ToJson(*status) : StatusText(*status)).c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Jobs(Daemon* daemon, const Arguments& arguments) {
  auto jobs = daemon->ListJobs();
  if (!jobs.ok()) return jobs.status();
  std::fputs((arguments.json ? ToJson(*jobs) : JobsText(*jobs)).c_str(), stdout);
  return absl::OkStatus();
}

absl::Status Top(Daemon* daemon, const Arguments& arguments) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  sigprocmask(SIG_BLOCK, &set, nullptr);
  const int signals = signalfd(-1, &set, SFD_CLOEXEC);
  if (signals < 0) return absl::UnavailableError("cannot wait for signals");
  const bool clear = isatty(STDOUT_FILENO) != 0 && !arguments.once;
  v1::ListJobsResponse before;
  absl::Time before_at = MonotonicNow();
  for (;;) {
    auto status = daemon->Status();
    if (!status.ok()) return status.status();
    auto jobs = daemon->ListJobs();
    if (!jobs.ok()) return jobs.status();
    const absl::Time now = MonotonicNow();
    const std::string text =
        arguments.json ? ToJson(*jobs)
                       : TopText(*status, before, *jobs, absl::ToDoubleSeconds(now - before_at));
    std::fputs(absl::StrCat(clear ? "\033[H\033[2J" : "", text).c_str(), stdout);
    std::fflush(stdout);
    if (arguments.once) break;
    before = *std::move(jobs);
    before_at = now;
    pollfd waiting{signals, POLLIN, 0};
    if (poll(&waiting, 1, static_cast<int>(arguments.interval_seconds * 1000)) > 0) break;
  }
  close(signals);
  return absl::OkStatus();
}

// What "auto" becomes in the file.
void AddAutoOptions(CLI::App* command, CheckConfigArguments* arguments) {
  command->add_option("--hidden-size", arguments->hidden_sizes,
                      "The model's, for \"auto\"; the largest of several counts");
  command->add_option("--auto", arguments->values,
                      "KEY=VALUE: what \"auto\" becomes, for example optimizer.params.lr=1e-4");
  command->add_flag("--deepspeed", arguments->deepspeed,
                    "As through a door for DeepSpeed's files: unknown keys at the top are "
                    "warnings");
}

CLI::App* AddPlan(CLI::App* app, PlanArguments* arguments) {
  CLI::App* const plan = app->add_subcommand(
      "plan", "The memory and the traffic of a job, before it runs");
  plan->add_option("--config", arguments->config.file, "JSON in DeepSpeed's shape")->required();
  CLI::Option_group* const model = plan->add_option_group("model", "What is trained");
  model->add_option("--params", arguments->parameters, "A transformer of so many parameters")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 40));
  model->add_option("--model", arguments->model, "One of " + ModelNames());
  model->require_option(1);
  plan->add_option("--nodes", arguments->nodes, "[1]");
  plan->add_option("--ranks", arguments->config.world, "In all, as many on each node [1]");
  plan->add_option("--node-memory", arguments->node_memory_bytes,
                   "Bytes that each node has for the job; they decide the gradient plan")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false));
  AddAutoOptions(plan, &arguments->config);
  return plan;
}

int Main(int argc, char** argv) {
  CLI::App app("zerodctl: looks at a zerod of this node, and tells it what to do.", "zerodctl");
  Arguments arguments;
  arguments.address = DefaultAddress();
  app.add_option("--address", arguments.address,
                 "unix:/path/zerod.sock [$ZEROD_ADDRESS, else unix:/run/zerod/zerod.sock]");
  app.add_flag("--json", arguments.json, "Print JSON: the fields of proto/zerod/v1/admin.proto");
  app.set_version_flag("--version", "zerodctl " ZEROD_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  CLI::App* const status = app.add_subcommand("status", "The daemon");
  CLI::App* const jobs = app.add_subcommand("jobs", "Its jobs, and what becomes of them");
  CLI::App* const remove = jobs->add_subcommand("delete", "End a job and free its state");
  remove->add_option("job", arguments.job, "The job's id")->required();
  CLI::App* const top = app.add_subcommand("top", "Jobs, again and again until Ctrl-C");
  top->add_flag("--once", arguments.once, "Print one screen");
  top->add_option("--interval-seconds", arguments.interval_seconds, "Time between screens [1]")
      ->check(CLI::Range(0.1, 3600.0));
  CLI::App* const drain = app.add_subcommand("drain", "Refuse new jobs, end with the last one");
  CLI::App* const check = app.add_subcommand(
      "check-config", "What a configuration comes to and why, without a daemon");
  check->add_option("file", arguments.check.file, "JSON in DeepSpeed's shape")->required();
  check->add_option("--world", arguments.check.world, "The number of ranks [1]");
  AddAutoOptions(check, &arguments.check);
  CLI::App* const plan = AddPlan(&app, &arguments.plan);
  CLI::App* const keys =
      app.add_subcommand("config-keys", "Every key of a configuration, as in docs/config.md");
  CLI11_PARSE(app, argc, argv);

  absl::Status result;
  if (check->parsed()) result = CheckConfig(arguments.check, arguments.json);
  if (keys->parsed()) PrintConfigKeys();
  const std::unique_ptr<Daemon> daemon = Daemon::Connect(arguments.address);
  if (status->parsed()) result = Status(daemon.get(), arguments);
  if (remove->parsed()) {
    result = daemon->DeleteJob(arguments.job);
  } else if (jobs->parsed()) {
    result = Jobs(daemon.get(), arguments);
  }
  if (top->parsed()) result = Top(daemon.get(), arguments);
  if (drain->parsed()) result = daemon->Drain();
  if (plan->parsed()) result = Plan(daemon.get(), arguments.plan, arguments.json);
  if (result.ok()) return 0;
  std::fprintf(stderr, "zerodctl: %s\n", std::string(result.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace zerod::ctl

int main(int argc, char** argv) { return zerod::ctl::Main(argc, argv); }
