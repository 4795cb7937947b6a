// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/client_slot.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace zerod::engine {

absl::StatusOr<std::shared_ptr<ClientSlot>> ClientSlot::Create(
    arena::Arena* arena, const std::string& job, core::SlotIndex slot, uint32_t rank, int pid,
    shm::UniqueFd pidfd, const core::Layout& layout, const core::JobPlan& plan) {
  std::shared_ptr<ClientSlot> client(new ClientSlot(slot, rank, pid));  // tidy: allow
  client->sections_ = shm::SubmitLayout(static_cast<uint32_t>(layout.units().size()),
                                        static_cast<uint32_t>(layout.parameters().size()));
  struct File {
    const char* name;
    uint64_t bytes;
    arena::Access access;
  };
  const File files[4] = {
      {"submissions", client->sections_.total, arena::Access::kClientWrites},
      {"completions", sizeof(shm::CompletePage), arena::Access::kClientReads},
      {"gradients", plan.gradient_file_bytes, arena::Access::kClientWrites},
      {"transfers", plan.transfer_bytes, arena::Access::kClientWrites},
  };
  for (int i = 0; i < 4; ++i) {
    const uint64_t bytes = std::max<uint64_t>(files[i].bytes, 4096);  // 0 cannot be mapped
    const std::string name = absl::StrCat(files[i].name, " of rank ", rank, " of job ", job);
    ASSIGN_OR_RETURN(client->files_[i], arena->Allocate(name, bytes, bytes, files[i].access));
  }
  shm::InitPages(reinterpret_cast<shm::SubmitPage*>(client->files_[0].data()), client->complete());
  ASSIGN_OR_RETURN(const int doorbell, shm::MakeDoorbell());
  client->doorbell_.Reset(doorbell);
  client->pidfd_ = std::move(pidfd);
  client->ring_ = std::make_unique<shm::ServeRing>(client->submit(), client->complete());
  return client;
}

uint64_t ClientSlot::control_bytes() const {
  return files_[0].bytes() + files_[1].bytes() + files_[3].bytes();
}

std::vector<int> ClientSlot::Fds(int units_fd, int window_fd) const {
  return {files_[0].fd(), files_[1].fd(), files_[2].fd(), files_[3].fd(),
          units_fd,       window_fd,      doorbell_.get()};
}

}  // namespace zerod::engine
