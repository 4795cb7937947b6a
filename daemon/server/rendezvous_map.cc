// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/rendezvous_map.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"

namespace zerod::server {
namespace {

absl::Status Closed() {
  return absl::UnavailableError("the job is over, and its rendezvous with it");
}

}  // namespace

absl::Status RendezvousMap::Set(const std::string& key, const std::string& value) {
  std::lock_guard lock(mu_);
  if (closed_) return Closed();
  const auto there = values_.find(key);
  if (there != values_.end()) {
    if (there->second == value) return absl::OkStatus();  // a repeated request
    return absl::AlreadyExistsError(
        absl::StrCat("the rendezvous key \"", key, "\" already has another value"));
  }
  const size_t bytes = key.size() + value.size();
  if (values_.size() >= limits_.rendezvous_keys_max ||
      bytes > limits_.rendezvous_value_bytes_max ||
      bytes_ + bytes > limits_.rendezvous_bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the rendezvous of a job holds ", limits_.rendezvous_keys_max, " keys, ",
                     limits_.rendezvous_value_bytes_max, " bytes each, ",
                     limits_.rendezvous_bytes_max, " in all"));
  }
  values_.emplace(key, value);
  bytes_ += bytes;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::StatusOr<std::string> RendezvousMap::Get(const std::string& key, absl::Duration timeout) {
  return Get(key, timeout, [] { return false; });
}

absl::StatusOr<std::string> RendezvousMap::Get(const std::string& key, absl::Duration timeout,
                                               const std::function<bool()>& cancelled) {
  const auto deadline =
      std::chrono::steady_clock::now() +
      absl::ToChronoNanoseconds(std::clamp(timeout, absl::ZeroDuration(), absl::Hours(24)));
  std::unique_lock lock(mu_);
  for (;;) {
    if (closed_) return Closed();
    const auto there = values_.find(key);
    if (there != values_.end()) return there->second;
    if (cancelled()) return absl::CancelledError("the caller has gone");
    const auto now = std::chrono::steady_clock::now();
    if (now >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("no member has set the rendezvous key \"", key, "\" in ",
                       absl::FormatDuration(timeout)));
    }
    changed_.wait_until(lock, std::min(deadline, now + std::chrono::milliseconds(100)));
  }
}

void RendezvousMap::Close() {
  std::lock_guard lock(mu_);
  closed_ = true;
  changed_.notify_all();
}

}  // namespace zerod::server
