// SPDX-License-Identifier: Apache-2.0
//
// The two pages of one client as the two processes see them: the daemon's memfds, mapped a second
// time as a client maps them, the complete page read-only.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "proto/shm/fd_passing.h"
#include "proto/shm/ring.h"

namespace zerod::shm {

class Pages {
 public:
  Pages() {
    submit_ = static_cast<SubmitPage*>(Share(sizeof(SubmitPage), PROT_READ | PROT_WRITE, &client_));
    void* read_only = nullptr;
    complete_ = static_cast<CompletePage*>(Share(sizeof(CompletePage), PROT_READ, &read_only));
    client_submit_ = static_cast<SubmitPage*>(client_);
    client_complete_ = static_cast<CompletePage*>(read_only);
    InitPages(submit_, complete_);
    doorbell_.Reset(MakeDoorbell().value());
  }
  ~Pages() {
    munmap(submit_, sizeof(SubmitPage));
    munmap(client_submit_, sizeof(SubmitPage));
    munmap(complete_, sizeof(CompletePage));
    munmap(client_complete_, sizeof(CompletePage));
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  SubmitPage* submit() { return submit_; }
  CompletePage* complete() { return complete_; }
  SubmitPage* client_submit() { return client_submit_; }
  const CompletePage* client_complete() { return client_complete_; }
  int doorbell() const { return doorbell_.get(); }

  // Whether the doorbell was rung since the last look. Tests may read it, the daemon never does.
  bool Rung() {
    uint64_t count;
    return read(doorbell_.get(), &count, sizeof(count)) == sizeof(count);
  }

 private:
  // A fresh file of zeros, mapped read-write, and once more with `protection` at `*second`.
  static void* Share(size_t bytes, int protection, void** second) {
    const UniqueFd fd(memfd_create("ring-test", MFD_CLOEXEC));
    if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) abort();
    void* first = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    *second = mmap(nullptr, bytes, protection, MAP_SHARED, fd.get(), 0);
    if (first == MAP_FAILED || *second == MAP_FAILED) abort();
    return first;
  }

  void* client_ = nullptr;
  SubmitPage* submit_;
  CompletePage* complete_;
  SubmitPage* client_submit_;
  CompletePage* client_complete_;
  UniqueFd doorbell_;
};

}  // namespace zerod::shm
