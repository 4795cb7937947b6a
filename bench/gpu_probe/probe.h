// SPDX-License-Identifier: Apache-2.0
//
// What all probes share: the answer (one JSON line, then one sentence), the exit codes, and a few
// helpers for processes that must end whatever happens. C++17, so that nvcc may compile it.
#pragma once

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

namespace probe {

constexpr int kAnswered = 0;
constexpr int kFailed = 1;
constexpr int kCannotBeHad = 77;  // what ctest and automake call "skipped"

inline double NowSeconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

inline double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

__attribute__((format(printf, 1, 2))) inline std::string Format(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

inline std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return quoted + "\"";
}

// The figures of one JSON object, in the order given.
class Figures {
 public:
  Figures& Raw(const std::string& name, const std::string& json) {
    text_ += (text_.empty() ? "" : ", ") + Quoted(name) + ": " + json;
    return *this;
  }
  Figures& Number(const std::string& name, double value) {
    return Raw(name, Format("%.10g", value));
  }
  Figures& Bool(const std::string& name, bool value) { return Raw(name, value ? "true" : "false"); }
  Figures& Text(const std::string& name, const std::string& value) {
    return Raw(name, Quoted(value));
  }
  std::string Json() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

// Prints the answer and returns the exit code to end with.
inline int Finish(const char* name, int code, const Figures& figures, const std::string& sentence) {
  const char* outcome =
      code == kAnswered ? "answered" : code == kCannotBeHad ? "cannot be had here" : "failed";
  printf("{\"probe\": \"%s\", \"outcome\": \"%s\", \"figures\": %s}\n%s\n", name, outcome,
         figures.Json().c_str(), sentence.c_str());
  fflush(stdout);
  return code;
}

// Forks a child that runs `function` and exits with what it returns. It dies with its parent.
template <class Function>
pid_t Spawn(Function function) {
  fflush(stdout);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid != 0) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kFailed);
  const int code = function();
  fflush(stdout);
  _exit(code);
}

// Waits for `pid`, kills it at the deadline. Returns its exit code, 128 + the signal that ended
// it, or -1 where the deadline did.
inline int Await(pid_t pid, double timeout_seconds) {
  const double deadline = NowSeconds() + timeout_seconds;
  for (;;) {
    int status = 0;
    const pid_t ended = waitpid(pid, &status, WNOHANG);
    if (ended == pid) return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (ended < 0 && errno != EINTR) return kFailed;
    if (NowSeconds() > deadline) {
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      return -1;
    }
    usleep(500);
  }
}

// A number of a "Name:   123 kB" line of /proc/self/status, -1 where there is none.
inline long StatusKib(const char* name) {
  FILE* file = fopen("/proc/self/status", "r");
  if (file == nullptr) return -1;
  char line[256];
  long value = -1;
  const size_t length = strlen(name);
  while (fgets(line, sizeof(line), file) != nullptr) {
    if (strncmp(line, name, length) == 0 && line[length] == ':') value = atol(line + length + 1);
  }
  fclose(file);
  return value;
}

}  // namespace probe
