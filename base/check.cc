// SPDX-License-Identifier: Apache-2.0
#include "base/check.h"

#include <unistd.h>

#include <cstdlib>

namespace zerod {

void CheckFailed(const char* file, int line, const std::string& what) {
  // One write of the whole line: threads that fail together don't mix their words, and nothing is
  // left in a buffer when abort ends the process.
  const std::string message =
      std::string(file) + ':' + std::to_string(line) + ": CHECK failed: " + what + '\n';
  size_t written = 0;
  while (written < message.size()) {
    const ssize_t n = ::write(STDERR_FILENO, message.data() + written, message.size() - written);
    if (n <= 0) break;  // nobody can be told; the core dump remains
    written += static_cast<size_t>(n);
  }
  std::abort();
}

}  // namespace zerod
