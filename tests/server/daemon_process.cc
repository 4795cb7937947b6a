// SPDX-License-Identifier: Apache-2.0
#include "tests/server/daemon_process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

namespace zerod::server::testing {
namespace {

sockaddr_un Address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  return address;
}

std::vector<char*> Pointers(std::vector<std::string>* strings) {
  std::vector<char*> pointers;
  for (std::string& s : *strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

// Forks, with the output going to files, and executes.
pid_t Spawn(std::vector<std::string> argv, const std::vector<std::string>& environment,
            const std::string& out, const std::string& err) {
  std::vector<char*> pointers = Pointers(&argv);
  std::vector<std::string> variables = environment;
  for (char** e = environ; *e != nullptr; ++e) variables.push_back(*e);
  std::vector<char*> environment_pointers = Pointers(&variables);
  const pid_t pid = fork();
  if (pid != 0) return pid;
  const int out_fd = open(out.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
  const int err_fd = open(err.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
  dup2(out_fd, 1);
  dup2(err_fd, 2);
  execve(pointers[0], pointers.data(), environment_pointers.data());
  _exit(127);
}

std::string Contents(const std::string& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::optional<int> WaitFor(pid_t pid, int pidfd) {
  pollfd ended{pidfd, POLLIN, 0};
  if (poll(&ended, 1, static_cast<int>(std::chrono::milliseconds(kPatience).count())) != 1) {
    return std::nullopt;
  }
  int status = 0;
  if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) return std::nullopt;
  return WEXITSTATUS(status);
}

shm::UniqueFd Pidfd(pid_t pid) {
  return shm::UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
}

}  // namespace

bool Eventually(const std::function<bool()>& condition, absl::Duration patience) {
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(patience);
  while (std::chrono::steady_clock::now() < deadline) {
    if (condition()) return true;
    poll(nullptr, 0, 10);  // of another process nobody tells us: look again
  }
  return condition();
}

TemporaryDirectory::TemporaryDirectory() {
  char pattern[] = "/tmp/zerod-test-XXXXXX";
  path_ = mkdtemp(pattern);
  chmod(path_.c_str(), 0755);
}

TemporaryDirectory::~TemporaryDirectory() { std::filesystem::remove_all(path_); }

Ran RunProgram(const std::string& program, const std::vector<std::string>& arguments) {
  TemporaryDirectory directory;
  std::vector<std::string> argv = {program};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  const std::string out = directory.path() + "/out";
  const std::string err = directory.path() + "/err";
  const pid_t pid = Spawn(argv, {}, out, err);
  const shm::UniqueFd pidfd = Pidfd(pid);
  Ran ran;
  std::optional<int> code = WaitFor(pid, pidfd.get());
  if (!code.has_value()) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  ran.exit_code = code.value_or(-1);
  ran.out = Contents(out);
  ran.err = Contents(err);
  return ran;
}

DaemonProcess::DaemonProcess(const std::string& directory, std::vector<std::string> arguments)
    : directory_(directory), notify_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
  const std::string notify_path = directory + "/notify";
  unlink(notify_path.c_str());
  const sockaddr_un address = Address(notify_path);
  if (bind(notify_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return;
  }
  std::vector<std::string> argv = {ZEROD_BINARY, "--socket", socket(), "--metrics-listen",
                                   "127.0.0.1:0"};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  pid_ = Spawn(argv, {"NOTIFY_SOCKET=" + notify_path}, directory + "/log", directory + "/log");
  pidfd_ = Pidfd(pid_);
  ready_ = WaitNotified("READY=1");
}

DaemonProcess::~DaemonProcess() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::string DaemonProcess::Log() const { return Contents(directory_ + "/log"); }

void DaemonProcess::Signal(int signal_number) { kill(pid_, signal_number); }

std::optional<int> DaemonProcess::WaitExit() {
  const std::optional<int> code = WaitFor(pid_, pidfd_.get());
  if (code.has_value()) pid_ = -1;
  return code;
}

bool DaemonProcess::WaitNotified(const std::string& text) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    pollfd waiting[2] = {{notify_.get(), POLLIN, 0}, {pidfd_.get(), POLLIN, 0}};
    poll(waiting, 2, static_cast<int>(left.count()));
    char datagram[4096];
    const ssize_t n = recv(notify_.get(), datagram, sizeof(datagram), MSG_DONTWAIT);
    if (n > 0 && std::string(datagram, n).find(text) != std::string::npos) return true;
    if (n <= 0 && (waiting[1].revents & POLLIN) != 0) return false;
  }
}

size_t DaemonProcess::OpenFds() const {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator("/proc/" + std::to_string(pid_) + "/fd")) {
    ++count;
  }
  return count;
}

shm::UniqueFd ConnectUnix(const std::string& path) {
  shm::UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_un address = Address(path);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fd.Reset();
  }
  return fd;
}

std::string FdClient::token() const {
  return std::string(reinterpret_cast<const char*>(welcome.token), sizeof(welcome.token));
}

std::optional<FdClient> FdConnect(const std::string& grpc_socket) {
  FdClient client;
  client.socket = ConnectUnix(grpc_socket + ".fd");
  if (!client.socket) return std::nullopt;
  shm::FdHello hello{};
  hello.magic = shm::kMagic;
  hello.format_version = shm::kFormatVersion;
  const absl::Duration limit = absl::FromChrono(kPatience);
  // A refusal may come, and the connection close, before the hello was sent.
  shm::SendFds(client.socket.get(), &hello, sizeof(hello), {}, limit).IgnoreError();
  if (!shm::ReceiveFds(client.socket.get(), &client.welcome, sizeof(client.welcome), 0, limit)
           .ok()) {
    return std::nullopt;
  }
  return client;
}

}  // namespace zerod::server::testing
