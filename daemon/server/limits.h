// SPDX-License-Identifier: Apache-2.0
//
// Every bound of the server in one place: times, queues, connections, message sizes. Times are
// ordered so that the one that knows the reason speaks first; CheckOrder says how.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace zerod::server {

struct Limits {
  // --- Times. A time measures the silence of the party waited for, never its slowness.
  absl::Duration fd_hello = absl::Seconds(5);        // from accept to FdHello
  absl::Duration heartbeat_interval = absl::Seconds(1);
  absl::Duration lease = absl::Seconds(5);           // silence of a member that is its death
  absl::Duration link_connect = absl::Seconds(2);    // one try to open a Link
  absl::Duration link_retry_min = absl::Milliseconds(100);
  absl::Duration link_retry_max = absl::Seconds(1);
  absl::Duration goodbye = absl::Seconds(10);        // from a member's goodbye to our job's end
  absl::Duration rendezvous_slice = absl::Seconds(1);  // one GetKey of a longer wait
  absl::Duration rendezvous_wait = absl::Seconds(60);  // the longest GetKey served
  absl::Duration fabric_stall = absl::Seconds(30);   // FabricOptions::stall_timeout
  absl::Duration create_wait = absl::Seconds(60);    // an Attach waits for the job's memory
  absl::Duration drain = absl::Seconds(10);          // SIGTERM: until jobs are ended
  absl::Duration shutdown_grace = absl::Seconds(5);  // RPCs in flight at the very end

  // --- Counts and sizes.
  size_t connections_max = 512;         // gRPC connections on the Unix socket
  size_t fd_connections_max = 256;      // processes on the fd socket
  size_t jobs_max = 64;
  size_t lost_jobs_max = 64;            // remembered, the oldest are forgotten
  uint32_t local_world_max = 64;        // ranks of a job on one node
  uint32_t world_max = 4096;
  size_t fresh_links_max = 256;         // links of other daemons that have not said hello
  int peer_streams_max = 64;            // calls at a time on one connection of another daemon
  size_t peer_network_bytes_max = size_t{2} << 30;  // gRPC's own memory for other daemons
  size_t link_queue_bytes_max = size_t{256} << 20;  // unsent messages to one member
  size_t peer_message_bytes_max = size_t{64} << 20;
  size_t local_message_bytes_max = size_t{16} << 20;  // an AttachRequest with its model
  size_t status_text_bytes_max = 3000;  // gRPC carries a status in headers, 8 KiB in all
  size_t rendezvous_keys_max = 65536;
  size_t rendezvous_value_bytes_max = size_t{1} << 20;
  size_t rendezvous_bytes_max = size_t{64} << 20;

  // OK where the times are in order; else which two are not.
  absl::Status CheckOrder() const;
};

}  // namespace zerod::server
