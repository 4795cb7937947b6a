// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/limits.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace zerod::server {
namespace {

struct Named {
  const char* name;
  absl::Duration value;
};

absl::Status CheckLess(const Named& small, const Named& large, const char* why) {
  if (small.value < large.value) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      small.name, " (", absl::FormatDuration(small.value), ") must be shorter than ", large.name,
      " (", absl::FormatDuration(large.value), "): ", why));
}

}  // namespace

absl::Status Limits::CheckOrder() const {
  const struct {
    Named small;
    Named large;
    const char* why;
  } rules[] = {
      {{"nothing", absl::ZeroDuration()}, {"heartbeat_interval", heartbeat_interval},
       "heartbeats have a pace"},
      {{"twice heartbeat_interval", 2 * heartbeat_interval}, {"lease", lease},
       "one lost heartbeat is not a death"},
      {{"link_retry_min", link_retry_min}, {"link_retry_max", link_retry_max},
       "retries slow down"},
      {{"rendezvous_slice", rendezvous_slice}, {"lease", lease},
       "a waiting member must notice that member 0 is gone"},
      {{"lease", lease}, {"fabric_stall", fabric_stall},
       "a dead member is named by its lease, not by a stalled transfer"},
      {{"lease", lease}, {"goodbye", goodbye}, "an orderly end is slower than no news"},
      {{"rendezvous_slice", rendezvous_slice}, {"rendezvous_wait", rendezvous_wait},
       "a wait is made of slices"},
      {{"fabric_stall", fabric_stall}, {"create_wait", create_wait},
       "a job that cannot connect fails before those who wait for it give up"},
  };
  for (const auto& rule : rules) {
    absl::Status status = CheckLess(rule.small, rule.large, rule.why);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace zerod::server
