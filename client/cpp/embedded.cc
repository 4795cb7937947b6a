// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/embedded.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/status.h"
#include "client/cpp/wait.h"
#include "proto/shm/fd_passing.h"

extern char** environ;

namespace zerod::client {
namespace {

constexpr size_t kNameBytesMax = 48;
constexpr size_t kLogTailBytes = 4096;
constexpr absl::Duration kPollInterval = absl::Milliseconds(20);
constexpr absl::Duration kExecPatience = absl::Seconds(2);  // for news of a failed exec

std::string Errno(absl::string_view doing) {
  return absl::StrCat("cannot ", doing, ": ", strerror(errno));
}

bool Executable(const std::string& path) {
  struct stat file {};
  return stat(path.c_str(), &file) == 0 && S_ISREG(file.st_mode) &&
         access(path.c_str(), X_OK) == 0;
}

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// A directory that nobody else can have prepared for us.
absl::Status MakePrivateDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::UnavailableError(Errno(absl::StrCat("make ", path)));
  }
  struct stat found {};
  if (lstat(path.c_str(), &found) != 0) {
    return absl::UnavailableError(Errno(absl::StrCat("look at ", path)));
  }
  if (!S_ISDIR(found.st_mode) || found.st_uid != geteuid() || (found.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(absl::StrCat(
        path, " is not a directory of this user's alone (mode 0700); remove it, or set "
              "XDG_RUNTIME_DIR"));
  }
  return absl::OkStatus();
}

// The lock that one starter holds. Its descriptor is closed in the daemon, so it ends with us.
absl::StatusOr<shm::UniqueFd> Lock(const std::string& path, absl::Time deadline,
                                   const std::function<bool()>& interrupted) {
  shm::UniqueFd lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) return absl::UnavailableError(Errno(absl::StrCat("open ", path)));
  while (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      return absl::UnavailableError(Errno(absl::StrCat("lock ", path)));
    }
    if (MonotonicNow() > deadline) {
      return absl::UnavailableError(absl::StrCat(
          "another process has been starting a daemon for too long: it holds ", path));
    }
    if (interrupted()) return absl::CancelledError("interrupted while starting a daemon");
    absl::SleepFor(kPollInterval);
  }
  return lock;
}

std::string LogTail(const std::string& path) {
  shm::UniqueFd log(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!log) return absl::StrCat("its log ", path, " cannot be read");
  const off_t end = lseek(log.get(), 0, SEEK_END);
  const off_t from = std::max<off_t>(0, end - static_cast<off_t>(kLogTailBytes));
  std::string text(static_cast<size_t>(std::max<off_t>(0, end - from)), '\0');
  const ssize_t n = pread(log.get(), text.data(), text.size(), from);
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  if (text.empty()) return absl::StrCat("its log ", path, " is empty");
  return absl::StrCat("the end of its log ", path, ":\n", text);
}

// What the daemon's process tells on the pipe before it becomes the daemon. The pipe then closes.
struct Report {
  enum Kind : int { kPid, kError } kind;
  int value;
};

struct Spawn {
  std::vector<std::string> arguments;
  std::vector<char*> argv;
  int null_fd = -1;
  int log_fd = -1;
  int report_fd = -1;
  int descriptors_max = 0;
};

// The second child. Between fork and exec of a threaded process only system calls are allowed: no
// heap, no locks.
[[noreturn]] void BecomeDaemon(const Spawn& spawn) {
  const Report born{Report::kPid, getpid()};
  (void)!write(spawn.report_fd, &born, sizeof(born));
  for (int signal_number = 1; signal_number < NSIG; ++signal_number) {
    if (signal_number != SIGKILL && signal_number != SIGSTOP) signal(signal_number, SIG_DFL);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  umask(077);
  // Our own descriptors are above 2 (see SpawnDaemon), so nothing is overwritten here.
  const bool ok = dup2(spawn.null_fd, 0) >= 0 && dup2(spawn.log_fd, 1) >= 0 &&
                  dup2(spawn.log_fd, 2) >= 0 && chdir("/") == 0;
  if (ok) {
#if defined(SYS_close_range)
    constexpr unsigned kCloseOnExec = 1u << 2;  // CLOSE_RANGE_CLOEXEC
    const bool closed = syscall(SYS_close_range, 3u, ~0u, kCloseOnExec) == 0;
#else
    const bool closed = false;
#endif
    if (!closed) {
      for (int fd = 3; fd < spawn.descriptors_max; ++fd) {
        if (fd != spawn.report_fd) close(fd);
      }
    }
    execve(spawn.argv[0], spawn.argv.data(), environ);
  }
  const Report failed{Report::kError, errno};
  (void)!write(spawn.report_fd, &failed, sizeof(failed));
  _exit(127);
}

// A descriptor above the standard ones, which a trainer may have closed.
absl::Status RaiseFd(shm::UniqueFd* fd) {
  if (fd->get() > 2) return absl::OkStatus();
  const int raised = fcntl(fd->get(), F_DUPFD_CLOEXEC, 3);
  if (raised < 0) return absl::UnavailableError(Errno("duplicate a descriptor"));
  fd->Reset(raised);
  return absl::OkStatus();
}

// Reads what the daemon's process tells until it runs its program; returns a pidfd of it.
absl::StatusOr<shm::UniqueFd> AwaitProgram(int report, const std::string& daemon,
                                           absl::Time deadline,
                                           const std::function<bool()>& interrupted) {
  shm::UniqueFd pidfd;
  absl::Time patience = deadline;
  for (;;) {
    pollfd news{report, POLLIN, 0};
    if (poll(&news, 1, static_cast<int>(absl::ToInt64Milliseconds(kPollInterval))) <= 0) {
      // A process that another thread forked meanwhile may keep the pipe open: whoever started the
      // daemon then sees by its answer, or its end, how it went.
      if (MonotonicNow() > patience) break;
      if (interrupted()) return absl::CancelledError("interrupted while starting a daemon");
      continue;
    }
    Report said{};
    const ssize_t n = read(report, &said, sizeof(said));
    if (n < 0 && errno == EINTR) continue;
    if (n != sizeof(said)) break;  // closed by exec
    if (said.kind == Report::kPid) {
      pidfd.Reset(static_cast<int>(syscall(SYS_pidfd_open, said.value, 0)));
      if (!pidfd) break;
      patience = std::min(deadline, MonotonicNow() + kExecPatience);
    } else {
      return absl::UnavailableError(
          absl::StrCat("cannot run ", daemon, ": ", strerror(said.value)));
    }
  }
  if (!pidfd) return absl::UnavailableError(Errno("start a daemon's process"));
  return pidfd;
}

// Starts the daemon's process; returns a pidfd of it.
absl::StatusOr<shm::UniqueFd> SpawnDaemon(const EmbeddedPaths& paths, absl::Time deadline,
                                          const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(const std::string daemon, FindDaemon());
  Spawn spawn;
  spawn.arguments = {daemon, "--embedded", "--socket", paths.socket};
  for (std::string& argument : spawn.arguments) spawn.argv.push_back(argument.data());
  spawn.argv.push_back(nullptr);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return absl::UnavailableError(Errno("make a pipe"));
  shm::UniqueFd report(ends[0]);
  shm::UniqueFd report_write(ends[1]);
  shm::UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  shm::UniqueFd log(
      open(paths.log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC | O_NOFOLLOW,
           0600));
  if (!null) return absl::UnavailableError(Errno("open /dev/null"));
  if (!log) return absl::UnavailableError(Errno(absl::StrCat("open ", paths.log)));
  for (shm::UniqueFd* fd : {&report_write, &null, &log}) RETURN_IF_ERROR(RaiseFd(fd));
  spawn.null_fd = null.get();
  spawn.log_fd = log.get();
  spawn.report_fd = report_write.get();
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  spawn.descriptors_max = static_cast<int>(std::min<rlim_t>(files.rlim_cur, 1 << 20));

  const pid_t child = fork();
  if (child < 0) return absl::ResourceExhaustedError(Errno("fork a daemon"));
  if (child == 0) {
    // A session of its own; then, no longer its leader, an orphan that nobody waits for.
    setsid();
    const pid_t second = fork();
    if (second == 0) BecomeDaemon(spawn);
    _exit(second < 0 ? 1 : 0);
  }
  report_write.Reset();
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return AwaitProgram(report.get(), daemon, deadline, interrupted);
}

}  // namespace

EmbeddedPaths EmbeddedPathsOf(const std::string& job, uint32_t node_rank) {
  EmbeddedPaths paths;
  const char* runtime = getenv("XDG_RUNTIME_DIR");
  // A path that leaves no room for the socket's name is as good as none.
  if (runtime != nullptr && runtime[0] == '/' && strlen(runtime) < 40 &&
      access(runtime, W_OK) == 0) {
    paths.directory = absl::StrCat(runtime, "/zerod");
  } else {
    paths.directory = absl::StrCat("/tmp/zerod-", geteuid());
  }
  bool plain = !job.empty() && job.size() <= kNameBytesMax;
  for (char c : job) {
    plain = plain && (std::isalnum(static_cast<unsigned char>(c)) || strchr("._-", c) != nullptr);
  }
  const std::string name =
      plain ? job : absl::StrCat("job-", Hasher().Add(absl::string_view(job)).Finish().Hex());
  const std::string stem = absl::StrCat(paths.directory, "/", name, ".", node_rank);
  paths.socket = stem + ".sock";
  paths.log = stem + ".log";
  paths.lock = stem + ".lock";
  return paths;
}

absl::StatusOr<std::string> FindDaemon() {
  if (const char* named = getenv("ZEROD_DAEMON"); named != nullptr && *named != '\0') {
    if (!Executable(named)) {
      return absl::NotFoundError(
          absl::StrCat("ZEROD_DAEMON is \"", named, "\", which is no executable file"));
    }
    char* resolved = realpath(named, nullptr);  // the daemon's working directory is another
    const std::string path = resolved != nullptr ? resolved : named;
    free(resolved);
    return path;
  }
  std::vector<std::string> tried;
  Dl_info here{};
  if (dladdr(reinterpret_cast<void*>(&FindDaemon), &here) != 0 && here.dli_fname != nullptr) {
    char* resolved = realpath(here.dli_fname, nullptr);
    const std::string directory = DirectoryOf(resolved != nullptr ? resolved : here.dli_fname);
    free(resolved);
    for (const char* place : {"/zerod", "/bin/zerod", "/../bin/zerod", "/../../bin/zerod"}) {
      tried.push_back(directory + place);
    }
  }
  const char* path = getenv("PATH");
  for (absl::string_view directory : absl::StrSplit(path != nullptr ? path : "", ':')) {
    if (!directory.empty() && directory[0] == '/') {
      tried.push_back(absl::StrCat(directory, "/zerod"));
    }
  }
  for (const std::string& candidate : tried) {
    if (Executable(candidate)) return candidate;
  }
  return absl::NotFoundError(absl::StrCat(
      "the daemon's program, zerod, is not installed; set ZEROD_DAEMON to it, or ZEROD_ADDRESS to "
      "the address of a daemon that runs. Looked for: ", absl::StrJoin(tried, ", ")));
}

absl::Status StartEmbedded(const EmbeddedPaths& paths, absl::Duration limit,
                           const std::function<bool()>& answers,
                           const std::function<bool()>& interrupted) {
  const absl::Time deadline = MonotonicNow() + limit;
  if (answers()) return absl::OkStatus();
  RETURN_IF_ERROR(MakePrivateDirectory(paths.directory));
  ASSIGN_OR_RETURN(const shm::UniqueFd lock, Lock(paths.lock, deadline, interrupted));
  if (answers()) return absl::OkStatus();  // somebody else was faster
  ASSIGN_OR_RETURN(const shm::UniqueFd process, SpawnDaemon(paths, deadline, interrupted));
  while (!answers()) {
    pollfd ended{process.get(), POLLIN, 0};
    const int64_t interval_ms = absl::ToInt64Milliseconds(kPollInterval);
    if (poll(&ended, 1, static_cast<int>(interval_ms)) > 0) {
      if (answers()) break;  // an older one was still there, and the new one made way
      return absl::UnavailableError(
          absl::StrCat("the daemon ended as soon as it was started; ", LogTail(paths.log)));
    }
    if (MonotonicNow() > deadline) {
      return absl::UnavailableError(
          absl::StrCat("the daemon was started and does not answer at ", paths.socket, " after ",
                       absl::FormatDuration(limit), "; ", LogTail(paths.log)));
    }
    if (interrupted()) return absl::CancelledError("interrupted while starting a daemon");
  }
  return absl::OkStatus();
}

}  // namespace zerod::client
