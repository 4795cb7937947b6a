// SPDX-License-Identifier: Apache-2.0
#include "tests/fabric/map_rendezvous.h"

#include <chrono>

#include "absl/strings/str_cat.h"

namespace zerod::fabric {

absl::Status MapRendezvous::Set(const std::string& key, const std::string& value) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::UnavailableError("the rendezvous map is closed");
  auto [entry, inserted] = values_.emplace(key, value);
  if (!inserted && entry->second != value) {
    return absl::AlreadyExistsError(
        absl::StrCat("rendezvous key '", key,
                     "' is set already: two members have the same rank, or the map is not fresh"));
  }
  changed_.notify_all();
  return absl::OkStatus();
}

absl::StatusOr<std::string> MapRendezvous::Get(const std::string& key, absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                    [&] { return closed_ || values_.count(key) > 0; });
  if (closed_) return absl::UnavailableError("the rendezvous map is closed");
  auto entry = values_.find(key);
  if (entry == values_.end()) {
    return absl::DeadlineExceededError(absl::StrCat("rendezvous key '", key, "' was not set in ",
                                                    absl::FormatDuration(timeout)));
  }
  return entry->second;
}

void MapRendezvous::Close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

}  // namespace zerod::fabric
