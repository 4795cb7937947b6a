// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/mailbox.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace zerod::engine {

absl::StatusOr<std::unique_ptr<Mailbox>> Mailbox::Create() {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot make an eventfd: ", strerror(errno),
                     "; raise the daemon's limit of open files (ulimit -n, LimitNOFILE=)"));
  }
  return std::unique_ptr<Mailbox>(new Mailbox(shm::UniqueFd(fd)));  // tidy: allow
}

void Mailbox::Post(std::function<void()> closure) {
  const std::lock_guard<std::mutex> lock(mu_);
  closures_.push_back(std::move(closure));
  // Under the lock: the owner may be destroyed as soon as this closure has run.
  if (closures_.size() == 1) {
    const uint64_t one = 1;
    const ssize_t written = write(wake_.get(), &one, sizeof(one));
    CHECK(written == sizeof(one) || errno == EAGAIN) << strerror(errno);
  }
}

std::vector<std::function<void()>> Mailbox::Take() {
  const std::lock_guard<std::mutex> lock(mu_);
  if (closures_.empty()) return {};
  uint64_t count;
  const ssize_t got = read(wake_.get(), &count, sizeof(count));
  CHECK(got == sizeof(count) || errno == EAGAIN) << strerror(errno);
  return std::exchange(closures_, {});
}

}  // namespace zerod::engine
