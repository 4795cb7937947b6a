// SPDX-License-Identifier: Apache-2.0
//
// The handshake: find or start the daemon, say hello on the fd socket, attach over gRPC, fetch the
// files.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/cpp/attachment.h"
#include "client/cpp/embedded.h"
#include "client/cpp/rpc.h"
#include "client/cpp/wait.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/fd_socket.h"

namespace zerod::client {
namespace {

constexpr absl::Duration kHelloLimit = absl::Seconds(10);
constexpr absl::Duration kVersionLimit = absl::Seconds(10);
constexpr absl::Duration kProbeLimit = absl::Seconds(2);
// Reserving the memory of a large job takes its time; that the daemon still lives is looked at
// meanwhile.
constexpr absl::Duration kAttachLimit = absl::Minutes(30);
constexpr absl::Duration kStateLimit = absl::Minutes(5);
constexpr absl::Duration kBackOffMin = absl::Milliseconds(20);
constexpr absl::Duration kBackOffMax = absl::Milliseconds(500);

std::string Environment(const char* name) {
  const char* value = getenv(name);
  return value != nullptr ? value : "";
}

absl::StatusOr<std::string> SocketPath(const std::string& address) {
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix:") || path.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the daemon's address is \"", address, "\"; it must be unix:/PATH, the socket of the "
        "daemon of this node"));
  }
  while (absl::StartsWith(path, "//")) path.remove_prefix(1);
  if (path.size() + 3 >= sizeof(sockaddr_un{}.sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the socket's path ", std::string(path), " is longer than ",
                     sizeof(sockaddr_un{}.sun_path) - 4, " bytes"));
  }
  return std::string(path);
}

// UNAVAILABLE where nobody listens.
absl::StatusOr<shm::UniqueFd> ConnectSocket(const std::string& path) {
  shm::UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot make a socket: ", strerror(errno)));
  }
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  memcpy(to.sun_path, path.c_str(), path.size() + 1);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
    const std::string text = absl::StrCat("no daemon answers at ", path, ": ", strerror(errno));
    if (errno == EACCES || errno == EPERM) {
      return absl::PermissionDeniedError(
          absl::StrCat(text, "; its socket is another user's, ask for access or run your own"));
    }
    return absl::UnavailableError(text);
  }
  return fd;
}

std::string Text(const char* text, size_t capacity) {
  return std::string(text, strnlen(text, capacity));
}

// What is fixed before the first try.
struct Target {
  AttachOptions options;  // with job and address filled in
  bool embedded = false;
  EmbeddedPaths paths;    // where embedded
};

absl::StatusOr<std::string> ResolveJob(const AttachOptions& options) {
  for (const std::string& id : {options.job, Environment("ZEROD_JOB"),
                                Environment("TORCHELASTIC_RUN_ID")}) {
    if (!id.empty()) return id;
  }
  if (options.world != 1) {
    return absl::InvalidArgumentError(
        "a job of several ranks needs an id that they share: set ZEROD_JOB or zerod.job");
  }
  uint64_t random = 0;
  if (getrandom(&random, sizeof(random), 0) != sizeof(random)) {
    return absl::InternalError(absl::StrCat("no random numbers: ", strerror(errno)));
  }
  return absl::StrCat("job-", absl::Hex(random, absl::kZeroPad16));
}

absl::StatusOr<Target> Resolve(AttachOptions options) {
  Target target;
  if (options.address.empty()) options.address = Environment("ZEROD_ADDRESS");
  ASSIGN_OR_RETURN(options.job, ResolveJob(options));
  if (options.address.empty()) {
    if (!options.embedded) {
      return absl::InvalidArgumentError(
          "no daemon is named and none may be started: set ZEROD_ADDRESS to unix:/PATH");
    }
    target.embedded = true;
    target.paths = EmbeddedPathsOf(options.job, options.node_rank);
    options.address = absl::StrCat("unix:", target.paths.socket);
  }
  RETURN_IF_ERROR(SocketPath(options.address).status());
  target.options = std::move(options);
  return target;
}

GiveUp Interrupted(const AttachOptions& options) {
  return [&options]() -> absl::Status {
    if (options.interrupt && options.interrupt()) {
      return absl::CancelledError("interrupted while attaching");
    }
    return absl::OkStatus();
  };
}

absl::StatusOr<DaemonVersion> AskVersion(const AttachOptions& options, absl::Duration limit) {
  ASSIGN_OR_RETURN(const std::string path, SocketPath(options.address));
  RETURN_IF_ERROR(ConnectSocket(path).status());  // quicker than gRPC to say that nobody is there
  RETURN_IF_ERROR(ConnectSocket(path + ".fd").status());
  return DaemonRpc::Create(options.address)->GetVersion(limit, Interrupted(options));
}

absl::Status EnsureEmbedded(const Target& target) {
  return StartEmbedded(
      target.paths, absl::Seconds(target.options.attach_timeout_seconds),
      [&] { return AskVersion(target.options, kProbeLimit).ok(); },
      [&] { return target.options.interrupt && target.options.interrupt(); });
}

struct Session {
  shm::UniqueFd socket;
  std::string token;
};

absl::StatusOr<Session> Hello(const std::string& path) {
  Session session;
  ASSIGN_OR_RETURN(session.socket, ConnectSocket(path + ".fd"));
  shm::FdHello hello{};
  hello.magic = shm::kMagic;
  hello.format_version = shm::kFormatVersion;
  RETURN_IF_ERROR(shm::SendFds(session.socket.get(), &hello, sizeof(hello), {}, kHelloLimit));
  shm::FdWelcome welcome{};
  RETURN_IF_ERROR(
      shm::ReceiveFds(session.socket.get(), &welcome, sizeof(welcome), 0, kHelloLimit).status());
  if (welcome.magic != shm::kMagic) {
    return absl::FailedPreconditionError(
        absl::StrCat("what listens at ", path, ".fd is no zerod daemon"));
  }
  if (welcome.code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(welcome.code),
                        Text(welcome.text, sizeof(welcome.text)));
  }
  session.token.assign(reinterpret_cast<const char*>(welcome.token), sizeof(welcome.token));
  return session;
}

absl::StatusOr<std::vector<shm::UniqueFd>> Fetch(const Session& session) {
  shm::FdFetch fetch{};
  fetch.magic = shm::kMagic;
  memcpy(fetch.token, session.token.data(), sizeof(fetch.token));
  RETURN_IF_ERROR(shm::SendFds(session.socket.get(), &fetch, sizeof(fetch), {}, kHelloLimit));
  shm::FdFiles files{};
  ASSIGN_OR_RETURN(std::vector<shm::UniqueFd> fds,
                   shm::ReceiveFds(session.socket.get(), &files, sizeof(files),
                                   shm::kClientFiles + 1, kHelloLimit));
  if (files.magic != shm::kMagic) return absl::InternalError("the answer to FdFetch is damaged");
  if (files.code != 0) {
    return absl::Status(static_cast<absl::StatusCode>(files.code),
                        Text(files.text, sizeof(files.text)));
  }
  if (fds.size() != shm::kClientFiles + 1) {
    return absl::InternalError(
        absl::StrCat("the daemon passed ", fds.size(), " files instead of ",
                     shm::kClientFiles + 1, "; is the limit of open files (ulimit -n) reached?"));
  }
  return fds;
}

absl::StatusOr<Attachment> AttachOnce(const Target& target) {
  const AttachOptions& options = target.options;
  ASSIGN_OR_RETURN(const std::string path, SocketPath(options.address));
  ASSIGN_OR_RETURN(Session session, Hello(path));
  std::unique_ptr<DaemonRpc> daemon = DaemonRpc::Create(options.address);
  ASSIGN_OR_RETURN(const DaemonVersion version,
                   daemon->GetVersion(kVersionLimit, Interrupted(options)));
  RETURN_IF_ERROR(CheckVersion(version, options.address));
  Attachment attachment;
  ASSIGN_OR_RETURN(attachment.plan, daemon->Attach(options, session.token, kAttachLimit,
                                                   Interrupted(options)));
  ASSIGN_OR_RETURN(attachment.files, Fetch(session));
  if (attachment.plan.committed_step > 0) {
    ASSIGN_OR_RETURN(attachment.client_state, daemon->ClientState(session.token, kStateLimit,
                                                                  Interrupted(options)));
  }
  attachment.address = options.address;
  attachment.socket = std::move(session.socket);
  attachment.interrupt = options.interrupt;
  attachment.on_wait = options.on_wait;
  attachment.wait_notice = absl::Seconds(options.wait_notice_seconds);
  return attachment;
}

// Sleeps, longer each time, and looks at `interrupt`. False: interrupted.
bool BackOff(const AttachOptions& options, absl::Duration* pause) {
  const absl::Time until = MonotonicNow() + *pause;
  *pause = std::min(*pause * 2, kBackOffMax);
  for (absl::Time now = MonotonicNow(); now < until; now = MonotonicNow()) {
    if (options.interrupt && options.interrupt()) return false;
    absl::SleepFor(std::min(until - now, kWaitSlice));
  }
  return true;
}

absl::Status WithTries(const absl::Status& status, absl::Duration spent, const char* name) {
  if (spent < absl::Seconds(1)) return status;
  return absl::Status(status.code(), absl::StrCat(status.message(), " (asked for ",
                                                  InSeconds(spent), ", see ", name, ")"));
}

// Repeats `once` while it says "not now" and there is time.
template <typename Once>
auto Repeat(const AttachOptions& options, const Once& once) -> decltype(once()) {
  const absl::Time start = MonotonicNow();
  const absl::Duration timeout = absl::Seconds(options.attach_timeout_seconds);
  const absl::Duration takeover = absl::Seconds(options.takeover_seconds);
  absl::Duration pause = kBackOffMin;
  absl::Time occupied_since = absl::InfiniteFuture();
  absl::Duration notice = absl::Seconds(options.notice_seconds);
  for (;;) {
    auto result = once();
    const absl::Time now = MonotonicNow();
    if (absl::IsUnavailable(result.status())) {
      if (now - start > timeout) {
        return WithTries(result.status(), now - start, "attach_timeout_seconds");
      }
    } else if (absl::IsAlreadyExists(result.status())) {
      // The predecessor of this rank may be on its way out.
      occupied_since = std::min(occupied_since, now);
      if (now - occupied_since > takeover) {
        return WithTries(result.status(), now - occupied_since, "takeover_seconds");
      }
    } else {
      return result;
    }
    if (options.on_wait && now - start >= notice) {
      options.on_wait(absl::StrCat("still attaching after ", InSeconds(now - start), ", for ",
                                   options.attach_timeout_seconds,
                                   " s at most: ", result.status().message()));
      notice = 2 * (now - start);
    }
    if (!BackOff(options, &pause)) return absl::CancelledError("interrupted while attaching");
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Attach(AttachOptions options) {
  ASSIGN_OR_RETURN(const Target target, Resolve(std::move(options)));
  for (const ParameterInfo& parameter : target.options.parameters) {
    for (int64_t size : parameter.shape) {
      if (size < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("parameter '", parameter.name, "' has a dimension of ", size));
      }
    }
  }
  absl::StatusOr<Attachment> attachment =
      Repeat(target.options, [&]() -> absl::StatusOr<Attachment> {
        if (target.embedded && target.options.local_rank == 0) {
          RETURN_IF_ERROR(EnsureEmbedded(target));
        }
        return AttachOnce(target);
      });
  if (!attachment.ok()) return attachment.status();
  return NewClient(*std::move(attachment));
}

absl::StatusOr<DaemonInfo> EnsureDaemon(const AttachOptions& options) {
  ASSIGN_OR_RETURN(const Target target, Resolve(options));
  absl::StatusOr<DaemonVersion> version =
      Repeat(target.options, [&]() -> absl::StatusOr<DaemonVersion> {
        if (target.embedded && target.options.local_rank == 0) {
          RETURN_IF_ERROR(EnsureEmbedded(target));
        }
        return AskVersion(target.options, kVersionLimit);
      });
  if (!version.ok()) return version.status();
  RETURN_IF_ERROR(CheckVersion(*version, target.options.address));
  return DaemonInfo{target.options.address, version->peer_address, version->boot_id};
}

std::string EmbeddedAddress(const std::string& job, uint32_t node_rank) {
  return absl::StrCat("unix:", EmbeddedPathsOf(job, node_rank).socket);
}

}  // namespace zerod::client
