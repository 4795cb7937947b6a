// SPDX-License-Identifier: Apache-2.0
//
// What a client is handed when it attaches: the daemon's answer as plain values, and the files.
// The seam between the handshake (attach.cc, rpc.cc) and everything that works in shared memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/include/zerod/client.h"
#include "proto/shm/fd_passing.h"

namespace zerod::client {

constexpr uint64_t DTypeBytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct UnitPlan {
  std::string name;
  uint64_t elements = 0;
  uint64_t trainable_elements = 0;
  uint64_t first_chunk = 0;
  uint64_t chunks = 0;
  uint64_t gradient_offset = 0;  // bytes; per_rank only
  bool resident = false;
};

struct ParameterPlan {  // in the order of AttachOptions::parameters
  std::string name;
  uint32_t unit = 0;
  uint64_t offset = 0;    // elements from the unit's start
  uint64_t elements = 0;
  uint32_t touched = 0;   // its place in the touched bytes
  bool trainable = true;
};

struct AttachPlan {
  uint64_t generation = 0;
  uint64_t committed_step = 0;
  double loss_scale = 1;           // of the next step
  bool committed_skipped = false;  // the committed step was skipped
  bool initialized = false;
  std::vector<UnitPlan> units;
  std::vector<ParameterPlan> parameters;
  uint64_t window_chunks = 0;
  bool node_sum = false;
  uint64_t gradient_bytes = 0;
  uint64_t staged_part_elements = 0;  // node_sum; a multiple of kParamAlignElements
  uint64_t transfer_bytes = 0;
  uint64_t blob_offset = 0;
  uint32_t stage = 0;
  DType dtype = DType::kFloat32;
  bool guard_pages = true;
  std::string resolved_config;
  std::string plan_text;
  uint32_t members = 1;
};

struct Attachment {
  AttachPlan plan;
  std::string address;               // for messages
  std::string client_state;
  shm::UniqueFd socket;              // the fd socket: hangs up when the daemon is gone
  std::vector<shm::UniqueFd> files;  // kClientFiles files, then the doorbell
  std::function<bool()> interrupt;   // may be empty
  std::function<void(const std::string&)> on_wait;  // likewise
  absl::Duration wait_notice = absl::InfiniteDuration();
};

// Maps the files. INTERNAL where they do not match the plan.
absl::StatusOr<std::unique_ptr<Client>> NewClient(Attachment attachment);

}  // namespace zerod::client
