// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/session.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <sys/random.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace zerod::server {

absl::StatusOr<std::shared_ptr<Session>> Session::Create(pid_t pid, uid_t uid) {
  std::string token(shm::kFdTokenBytes, 0);
  shm::UniqueFd gone(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!gone || getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) {
    return absl::UnavailableError(
        absl::StrCat("the daemon cannot take another client now: ", strerror(errno)));
  }
  return std::make_shared<Session>(std::move(token), pid, uid, std::move(gone));
}

void Session::MarkGone() {
  eventfd_write(gone_.get(), 1);
  std::lock_guard lock(mu_);
  is_gone_ = true;
  files_.clear();
}

void Session::SetFiles(std::vector<shm::UniqueFd> files) {
  std::lock_guard lock(mu_);
  if (!is_gone_) files_ = std::move(files);
}

absl::StatusOr<std::vector<shm::UniqueFd>> Session::TakeFiles() {
  std::lock_guard lock(mu_);
  if (files_.empty()) {
    return absl::FailedPreconditionError(
        "there are no files for this process: call Jobs.Attach first, and fetch once");
  }
  return std::exchange(files_, {});
}

void Session::SetPlace(Place place) {
  std::lock_guard lock(mu_);
  place_ = std::move(place);
  placed_ = true;
}

absl::StatusOr<Session::Place> Session::place() const {
  std::lock_guard lock(mu_);
  if (!placed_) {
    return absl::FailedPreconditionError("this process is attached to no job: call Attach first");
  }
  return place_;
}

void Session::ForgetJob(uint64_t incarnation) {
  std::lock_guard lock(mu_);
  if (!placed_ || place_.incarnation != incarnation) return;
  files_.clear();
}

void SessionTable::Add(const std::shared_ptr<Session>& session) {
  std::lock_guard lock(mu_);
  const bool added = sessions_.emplace(session->token(), session).second;
  CHECK(added);  // 16 random bytes
}

void SessionTable::Remove(const Session& session) {
  std::lock_guard lock(mu_);
  sessions_.erase(session.token());
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Find(const std::string& token) const {
  std::lock_guard lock(mu_);
  const auto it = sessions_.find(token);
  if (it == sessions_.end()) {
    return absl::PermissionDeniedError(
        "the token is not that of a connected process: connect to the fd socket, keep that "
        "connection, and use the token that it answered with");
  }
  return it->second;
}

void SessionTable::ForgetJob(uint64_t incarnation) {
  std::lock_guard lock(mu_);
  for (const auto& [token, session] : sessions_) session->ForgetJob(incarnation);
}

size_t SessionTable::size() const {
  std::lock_guard lock(mu_);
  return sessions_.size();
}

}  // namespace zerod::server
