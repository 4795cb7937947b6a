// SPDX-License-Identifier: Apache-2.0
//
// zerod: reads flags and file, serves, and leaves in order.
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "daemon/server/options.h"
#include "daemon/server/server.h"
#include "daemon/server/systemd.h"
#include "proto/shm/fd_passing.h"
#include "spdlog/sinks/basic_file_sink.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr absl::Duration kEndJobsWait = absl::Seconds(20);

absl::Status StartLog(const Options& options) {
  std::shared_ptr<spdlog::logger> log;
  try {
    log = options.log_file.empty() ? spdlog::stderr_logger_mt("zerod")
                                   : spdlog::basic_logger_mt("zerod", options.log_file);
  } catch (const spdlog::spdlog_ex& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write the log to ", options.log_file, ": ", error.what()));
  }
  log->set_level(spdlog::level::from_str(options.log_level));
  log->flush_on(spdlog::level::info);
  log->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %L zerod[%P] %v");
  spdlog::set_default_logger(std::move(log));
  return absl::OkStatus();
}

// Signals, the watchdog, the embedded daemon's end: looked at a few times a second.
class MainLoop {
 public:
  MainLoop(const Options& options, Server* server, int signals)
      : options_(options), server_(server), signals_(signals) {}

  // Returns when the daemon shall end and its jobs have ended.
  void Run() {
    // An embedded daemon has its trainer's environment, whose service manager is not told of it.
    if (!options_.embedded) watchdog_ = SystemdWatchdogInterval();
    Notify(absl::StrCat("READY=1\nSTATUS=serving unix:", options_.socket));
    while (!Finished()) Wait();
    Notify("STOPPING=1\nSTATUS=ending jobs");
    server_->Drain(/*closed=*/true);
    if (!server_->EndJobs(kEndJobsWait)) {
      spdlog::critical("jobs did not end in {}", absl::FormatDuration(kEndJobsWait));
      LeaveNow();
    }
  }

 private:
  void Notify(const std::string& state) {
    if (options_.embedded) return;
    if (absl::Status status = NotifySystemd(state); !status.ok()) {
      spdlog::warn("{}", status.ToString());
    }
  }

  void Wait() {
    pollfd waiting{signals_, POLLIN, 0};
    const absl::Duration tick =
        std::min(absl::Milliseconds(200), watchdog_.value_or(absl::InfiniteDuration()));
    poll(&waiting, 1, static_cast<int>(std::max<int64_t>(1, absl::ToInt64Milliseconds(tick))));
    signalfd_siginfo info{};
    while (read(signals_, &info, sizeof(info)) == sizeof(info)) OnSignal(info);
    const absl::Time now = MonotonicNow();
    if (watchdog_.has_value() && now >= next_watchdog_) {
      Notify("WATCHDOG=1");
      next_watchdog_ = now + *watchdog_ / 2;
    }
  }

  void OnSignal(const signalfd_siginfo& info) {
    const char* const name = strsignal(static_cast<int>(info.ssi_signo));
    if (deadline_ != absl::InfiniteFuture()) {
      spdlog::warn("{} again: leaving at once", name);
      LeaveNow();
    }
    spdlog::info("{}: jobs have {} to end", name, absl::FormatDuration(options_.limits.drain));
    server_->Drain(/*closed=*/true);
    deadline_ = MonotonicNow() + options_.limits.drain;
    Notify(absl::StrCat("STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=",
                        absl::ToInt64Microseconds(options_.limits.drain + kEndJobsWait)));
  }

  bool Finished() {
    const absl::Time now = MonotonicNow();
    if (now >= deadline_) return true;
    const bool busy = server_->jobs() > 0;
    if (server_->draining() && !busy) return true;
    if (!options_.embedded) return false;
    if (busy || server_->clients() > 0) last_busy_ = now;
    if (now - last_busy_ <= options_.embedded_linger) return false;
    spdlog::info("no job and no client for {}: an embedded daemon ends then",
                 absl::FormatDuration(options_.embedded_linger));
    return true;
  }

  [[noreturn]] void LeaveNow() {
    server_->RemoveSockets();
    spdlog::shutdown();
    _exit(0);
  }

  const Options& options_;
  Server* const server_;
  const int signals_;
  std::optional<absl::Duration> watchdog_;
  absl::Time next_watchdog_ = absl::InfinitePast();
  absl::Time deadline_ = absl::InfiniteFuture();  // of a drain by signal
  absl::Time last_busy_ = MonotonicNow();
};

int Main(int argc, char** argv) {
  absl::StatusOr<CommandLine> line = ParseCommandLine(argc, argv);
  if (!line.ok()) {
    std::fprintf(stderr, "zerod: %s\n", std::string(line.status().message()).c_str());
    return 2;
  }
  if (line->action == CommandLine::Action::kExit) {
    std::fputs(line->text.c_str(), stdout);
    return 0;
  }
  if (absl::Status status = StartLog(line->options); !status.ok()) {
    std::fprintf(stderr, "zerod: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  // Blocked before any thread starts, so that all of them leave signals to the loop.
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
  shm::UniqueFd signals(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(line->options);
  if (!server.ok() || !signals) {
    const std::string why(server.ok() ? absl::string_view("cannot wait for signals")
                                      : server.status().message());
    spdlog::critical("{}", why);
    if (!line->options.log_file.empty()) std::fprintf(stderr, "zerod: %s\n", why.c_str());
    return 1;
  }
  MainLoop(line->options, server->get(), signals.get()).Run();
  server->reset();
  spdlog::info("ended");
  spdlog::shutdown();
  return 0;
}

}  // namespace
}  // namespace zerod::server

int main(int argc, char** argv) { return zerod::server::Main(argc, argv); }
