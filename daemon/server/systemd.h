// SPDX-License-Identifier: Apache-2.0
//
// sd_notify(3), spoken directly: a datagram to $NOTIFY_SOCKET. Does nothing where there is none.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace zerod::server {

// `state`: lines such as "READY=1\nSTATUS=...". Thread-safe.
absl::Status NotifySystemd(const std::string& state);

// How often "WATCHDOG=1" must be sent: half of $WATCHDOG_USEC where it is meant for this process.
std::optional<absl::Duration> SystemdWatchdogInterval();

}  // namespace zerod::server
