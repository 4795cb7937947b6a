// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/options.h"

#include <arpa/inet.h>
#include <sched.h>
#include <sys/un.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <set>
#include <sstream>
#include <utility>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/config.h"
#include "base/status.h"
#include "proto/shm/format.h"
#include "yaml-cpp/yaml.h"

namespace zerod::server {
namespace {

constexpr const char* kLogLevels[] = {"trace", "debug", "info", "warning", "error", "critical"};

// What the flags and the file fill in, before it is checked.
struct Raw {
  Options options;
  std::string socket_mode = "0600";
  std::string metrics_listen;
  bool metrics_listen_given = false;
  double lease_seconds = 5;
  double drain_seconds = 10;
  double embedded_linger_seconds = 30;
};

std::string DefaultSocket() {
  // systemd may name several directories, separated by colons.
  const char* const runtime = std::getenv("RUNTIME_DIRECTORY");
  std::string directory = runtime == nullptr ? "" : runtime;
  directory = directory.substr(0, directory.find(':'));
  return absl::StrCat(directory.empty() ? "/run/zerod" : directory, "/zerod.sock");
}

// Lets CLI11 read YAML. Only a flat map of the served names is allowed.
class YamlConfig : public CLI::Config {
 public:
  explicit YamlConfig(const CLI::App* app) : app_(app) {}

  std::string to_config(const CLI::App*, bool, bool, std::string) const override { return ""; }

  std::vector<CLI::ConfigItem> from_config(std::istream& in) const override {
    YAML::Node root;
    try {
      root = YAML::Load(in);
    } catch (const YAML::Exception& error) {
      throw CLI::ConfigError(absl::StrCat("the configuration file is not YAML: ", error.what()),
                             CLI::ExitCodes::ConfigError);
    }
    std::vector<CLI::ConfigItem> parsed;
    if (root.IsNull()) return parsed;
    if (!root.IsMap()) Refuse("the configuration file must be a map of names to values");
    std::set<std::string> seen;
    for (const auto& pair : root) {
      if (!pair.first.IsScalar()) Refuse("the configuration file has a key that is not a name");
      const std::string key = pair.first.Scalar();
      CheckKey(key);
      if (!seen.insert(key).second) {
        Refuse(absl::StrCat("the configuration file has the key \"", key, "\" twice"));
      }
      if (pair.second.IsSequence() && pair.second.size() == 0) {
        RefuseUnlessList(key);
        continue;
      }
      CLI::ConfigItem item;
      item.name = absl::StrReplaceAll(key, {{"_", "-"}});
      item.inputs = Values(key, pair.second);
      parsed.push_back(std::move(item));
    }
    return parsed;
  }

 private:
  [[noreturn]] static void Refuse(const std::string& what) {
    throw CLI::ConfigError(what, CLI::ExitCodes::ConfigError);
  }

  void CheckKey(const std::string& key) const {
    std::vector<std::string> served;
    for (const CLI::Option* option : app_->get_options()) {
      if (!option->get_configurable()) continue;
      served.push_back(absl::StrReplaceAll(option->get_lnames().at(0), {{"-", "_"}}));
      if (served.back() == key) return;
    }
    const std::string nearest = NearestWord(key, served);
    Refuse(absl::StrCat("the configuration file has the unknown key \"", key, "\"; ",
                        nearest.empty()
                            ? absl::StrCat("served are: ", absl::StrJoin(served, ", "))
                            : absl::StrCat("did you mean \"", nearest, "\"?")));
  }

  void RefuseUnlessList(const std::string& key) const {
    const std::string name = absl::StrCat("--", absl::StrReplaceAll(key, {{"_", "-"}}));
    if (app_->get_option(name)->get_items_expected_max() > 1) return;
    Refuse(absl::StrCat("\"", key, "\" is an empty list where a value belongs"));
  }

  static std::vector<std::string> Values(const std::string& key, const YAML::Node& node) {
    std::vector<std::string> values;
    if (node.IsScalar()) {
      values.push_back(node.Scalar());
    } else if (node.IsSequence()) {
      for (const YAML::Node& element : node) {
        if (!element.IsScalar()) Refuse(absl::StrCat("\"", key, "\" must be a list of values"));
        values.push_back(element.Scalar());
      }
    } else {
      Refuse(absl::StrCat("\"", key, "\" has no value, or a map where a value belongs"));
    }
    return values;
  }

  const CLI::App* const app_;
};

void Describe(CLI::App* app, Raw* raw) {
  Options& o = raw->options;
  app->add_option("--socket", o.socket,
                  "Path of the gRPC socket; the fd socket is beside it, PATH.fd "
                  "[$RUNTIME_DIRECTORY/zerod.sock, else /run/zerod/zerod.sock]");
  app->add_option("--socket-mode", raw->socket_mode, "Octal mode of the sockets [0600]");
  app->add_option("--allow-uid", o.allow_uids, "Users who may connect, beside our own and root");
  app->add_option("--allow-gid", o.allow_gids,
                  "Groups whose members may connect, beside the socket's own where its mode lets "
                  "the group write");
  app->add_option("--peer-listen", o.peer_listen,
                  "HOST:PORT for other daemons; port 0 = any free one [127.0.0.1:0]");
  app->add_option("--peer-advertise", o.peer_advertise,
                  "HOST:PORT at which other daemons reach this one [what is listened on]");
  app->add_flag("--insecure-peers", o.insecure_peers,
                "Allow a --peer-listen that is not loopback, although the traffic is neither "
                "encrypted nor authenticated beyond the job's token: for trusted networks");
  app->add_option("--metrics-listen", raw->metrics_listen,
                  "HOST:PORT of the metrics; empty = none [127.0.0.1:9470, embedded 127.0.0.1:0]")
      ->each([raw](const std::string&) { raw->metrics_listen_given = true; });
  app->add_option("--memory-reserve-bytes", o.memory_reserve_bytes,
                  "Memory that no job gets, whatever it asks [268435456]");
  app->add_option("--worker-threads", o.worker_threads,
                  "Kernel threads of each job; 0 = one per core [0]");
  app->add_option("--lease-seconds", raw->lease_seconds,
                  "Silence after which another daemon counts as dead [5]");
  app->add_option("--drain-seconds", raw->drain_seconds,
                  "From SIGTERM until jobs that still run are ended [10]");
  app->add_option("--log-level", o.log_level,
                  absl::StrCat("One of ", absl::StrJoin(kLogLevels, ", "), " [info]"));
  app->add_option("--log-file", o.log_file, "File to append the log to [standard error]");
  app->add_flag("--embedded", o.embedded,
                "A private daemon: ends by itself when it had no job and no client for a while");
  app->add_option("--embedded-linger-seconds", raw->embedded_linger_seconds,
                  "How long that while is [30]");
}

absl::StatusOr<absl::Duration> Seconds(const char* name, double seconds, double min, double max) {
  if (std::isfinite(seconds) && seconds >= min && seconds <= max) return absl::Seconds(seconds);
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", seconds, "; it must be between ", min, " and ", max));
}

absl::Status CheckSocket(const std::string& path) {
  constexpr size_t kPathMax = sizeof(sockaddr_un::sun_path) - 1 - sizeof(".lock");
  if (path.empty() || path[0] != '/') {
    return absl::InvalidArgumentError(
        absl::StrCat("--socket is \"", path, "\"; it must be an absolute path"));
  }
  if (path.size() > kPathMax) {
    return absl::InvalidArgumentError(absl::StrCat("--socket has ", path.size(),
                                                   " characters; the system allows ", kPathMax,
                                                   ": choose a shorter directory"));
  }
  return absl::OkStatus();
}

absl::Status CheckPeers(const Options& o) {
  ASSIGN_OR_RETURN(const HostPort listen, ParseHostPort(o.peer_listen));
  if (!IsLoopback(listen.host) && !o.insecure_peers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--peer-listen is ", o.peer_listen, ", which other machines reach, and the traffic between "
        "daemons is not encrypted: on a trusted network, say --insecure-peers too"));
  }
  if (!o.peer_advertise.empty()) return ParseHostPort(o.peer_advertise).status();
  in_addr any{};
  if (inet_pton(AF_INET, listen.host.c_str(), &any) == 1 && any.s_addr == INADDR_ANY) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--peer-listen is ", o.peer_listen,
        ", which says not at which address others reach this node: name it by --peer-advertise"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Options> Check(Raw raw) {
  Options o = std::move(raw.options);
  if (o.socket.empty()) o.socket = DefaultSocket();
  RETURN_IF_ERROR(CheckSocket(o.socket));
  char* end = nullptr;
  const unsigned long mode = std::strtoul(raw.socket_mode.c_str(), &end, 8);
  if (raw.socket_mode.empty() || *end != 0 || mode > 0777 || (mode & 0600) != 0600) {
    return absl::InvalidArgumentError(
        absl::StrCat("--socket-mode is \"", raw.socket_mode,
                     "\"; it must be octal, between 0600 and 0777, and let the owner in"));
  }
  o.socket_mode = static_cast<uint32_t>(mode);
  RETURN_IF_ERROR(CheckPeers(o));
  o.metrics_listen = raw.metrics_listen_given ? raw.metrics_listen
                     : o.embedded             ? "127.0.0.1:0"
                                              : "127.0.0.1:9470";
  if (!o.metrics_listen.empty()) RETURN_IF_ERROR(ParseHostPort(o.metrics_listen).status());
  if (o.worker_threads > 1024) {
    return absl::InvalidArgumentError("--worker-threads must be at most 1024");
  }
  if (o.worker_threads == 0) {
    cpu_set_t cores;
    o.worker_threads = sched_getaffinity(0, sizeof(cores), &cores) == 0
                           ? static_cast<uint32_t>(CPU_COUNT(&cores))
                           : 1;
  }
  ASSIGN_OR_RETURN(o.limits.lease, Seconds("--lease-seconds", raw.lease_seconds, 0.5, 3600));
  ASSIGN_OR_RETURN(o.limits.drain, Seconds("--drain-seconds", raw.drain_seconds, 0, 1e6));
  ASSIGN_OR_RETURN(o.embedded_linger,
                   Seconds("--embedded-linger-seconds", raw.embedded_linger_seconds, 0, 1e6));
  // What hangs on the lease follows it.
  Limits& l = o.limits;
  l.heartbeat_interval = l.lease / 5;
  l.rendezvous_slice = std::min(l.rendezvous_slice, l.lease / 2);
  l.goodbye = std::max(l.goodbye, 2 * l.lease);
  l.fabric_stall = std::max(l.fabric_stall, 2 * l.lease);
  l.create_wait = std::max(l.create_wait, 2 * l.fabric_stall);
  RETURN_IF_ERROR(l.CheckOrder());
  for (const char* level : kLogLevels) {
    if (o.log_level == level) return o;
  }
  return absl::InvalidArgumentError(absl::StrCat("--log-level is \"", o.log_level,
                                                 "\"; it must be one of ",
                                                 absl::StrJoin(kLogLevels, ", ")));
}

std::string Effective(const Options& o) {
  std::ostringstream mode;
  mode << '0' << std::oct << o.socket_mode;
  return absl::StrCat(
      "socket: ", o.socket, "\nsocket_mode: \"", mode.str(), "\"\nallow_uid: [",
      absl::StrJoin(o.allow_uids, ", "), "]\nallow_gid: [", absl::StrJoin(o.allow_gids, ", "),
      "]\npeer_listen: ", o.peer_listen, "\npeer_advertise: \"", o.peer_advertise,
      "\"\ninsecure_peers: ", o.insecure_peers ? "true" : "false", "\nmetrics_listen: \"",
      o.metrics_listen, "\"\nmemory_reserve_bytes: ", o.memory_reserve_bytes,
      "\nworker_threads: ", o.worker_threads,
      "\nlease_seconds: ", absl::ToDoubleSeconds(o.limits.lease),
      "\ndrain_seconds: ", absl::ToDoubleSeconds(o.limits.drain), "\nlog_level: ", o.log_level,
      "\nlog_file: \"", o.log_file, "\"\nembedded: ", o.embedded ? "true" : "false",
      "\nembedded_linger_seconds: ", absl::ToDoubleSeconds(o.embedded_linger), "\n");
}

}  // namespace

absl::StatusOr<HostPort> ParseHostPort(const std::string& text) {
  HostPort parsed;
  const size_t colon = text.rfind(':');
  uint32_t port = 0;
  bool ok = colon != std::string::npos && colon > 0 &&
            absl::SimpleAtoi(text.substr(colon + 1), &port) && port <= 65535;
  if (ok) {
    parsed.host = text.substr(0, colon);
    parsed.port = static_cast<uint16_t>(port);
    const bool bracketed = parsed.host.front() == '[' && parsed.host.back() == ']';
    if (bracketed) parsed.host = parsed.host.substr(1, parsed.host.size() - 2);
    ok = !parsed.host.empty() && (bracketed || parsed.host.find(':') == std::string::npos);
  }
  if (!ok) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is not HOST:PORT (such as 127.0.0.1:9470)"));
  }
  return parsed;
}

bool IsLoopback(const std::string& host) {
  if (host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6{};
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::StatusOr<CommandLine> ParseCommandLine(int argc, const char* const* argv) {
  CLI::App app("zerod: owns the ZeRO-partitioned state of the training jobs of this node.",
               "zerod");
  Raw raw;
  Describe(&app, &raw);
  app.set_config("--config", "", "YAML file with the same names, - as _; flags win")
      ->configurable(false);
  app.config_formatter(std::make_shared<YamlConfig>(&app));
  bool check_config = false;
  app.add_flag("--check-config", check_config, "Print what the configuration comes to, and exit")
      ->configurable(false);
  app.set_version_flag("--version", absl::StrCat("zerod ", ZEROD_VERSION, " (shared memory format ",
                                                 shm::kFormatVersion, ")"))
      ->configurable(false);
  app.get_help_ptr()->configurable(false);

  CommandLine line;
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success&) {
    line.action = CommandLine::Action::kExit;
    line.text = app.get_help_ptr()->count() > 0 ? app.help() : app.version() + "\n";
    return line;
  } catch (const CLI::Error& error) {
    return absl::InvalidArgumentError(error.what());
  }
  ASSIGN_OR_RETURN(line.options, Check(std::move(raw)));
  if (check_config) {
    line.action = CommandLine::Action::kExit;
    line.text = Effective(line.options);
  }
  return line;
}

}  // namespace zerod::server
