// SPDX-License-Identifier: Apache-2.0
//
// An io_uring by raw system calls: a probe asks the kernel, not a library, and builds where
// liburing is not installed. One thread; no SQPOLL.
#pragma once

#include <linux/io_uring.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "bench/gpu_probe/probe.h"

namespace probe {

class Uring {
 public:
  Uring() = default;
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;
  ~Uring() {
    if (sqes_ != nullptr) munmap(sqes_, sqes_bytes_);
    if (rings_ != nullptr) munmap(rings_, rings_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  // Returns 0 or an errno: ENOSYS and EPERM mean that this kernel or container forbids io_uring.
  int Open(unsigned entries) {
    io_uring_params params = {};
    fd_ = static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
    if (fd_ < 0) return errno;
    if (!(params.features & IORING_FEAT_SINGLE_MMAP)) return ENOTSUP;  // before Linux 5.4
    rings_bytes_ =
        std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                         params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    void* rings = mmap(nullptr, rings_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                       fd_, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED) return errno;
    rings_ = static_cast<char*>(rings);
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    void* sqes = mmap(nullptr, sqes_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                      IORING_OFF_SQES);
    if (sqes == MAP_FAILED) return errno;
    sqes_ = static_cast<io_uring_sqe*>(sqes);
    sq_tail_ = Word(params.sq_off.tail);
    sq_array_ = Word(params.sq_off.array);
    sq_mask_ = *Word(params.sq_off.ring_mask);
    cq_head_ = Word(params.cq_off.head);
    cq_tail_ = Word(params.cq_off.tail);
    cq_mask_ = *Word(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
    return 0;
  }

  // Returns 0 or an errno; ENOMEM is RLIMIT_MEMLOCK.
  int RegisterBuffers(const iovec* buffers, unsigned count) {
    return syscall(__NR_io_uring_register, fd_, IORING_REGISTER_BUFFERS, buffers, count) < 0
               ? errno
               : 0;
  }

  // Queues one request; the caller has no more than the ring's entries in flight.
  void Queue(uint8_t opcode, int file, void* data, uint32_t bytes, uint64_t offset, uint64_t tag) {
    const uint32_t tail = *sq_tail_;
    io_uring_sqe* sqe = &sqes_[tail & sq_mask_];
    memset(sqe, 0, sizeof(*sqe));
    sqe->opcode = opcode;
    sqe->fd = file;
    sqe->addr = reinterpret_cast<uint64_t>(data);
    sqe->len = bytes;
    sqe->off = offset;
    sqe->user_data = tag;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  }

  // Returns the number submitted or -errno.
  int Enter(unsigned submit, unsigned wait) {
    const long result = syscall(__NR_io_uring_enter, fd_, submit, wait,
                                wait > 0 ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
    return result < 0 ? -errno : static_cast<int>(result);
  }

  bool Take(uint64_t* tag, int32_t* result) {
    const uint32_t head = *cq_head_;
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    *tag = cqes_[head & cq_mask_].user_data;
    *result = cqes_[head & cq_mask_].res;
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
  }

 private:
  uint32_t* Word(uint32_t offset) { return reinterpret_cast<uint32_t*>(rings_ + offset); }

  int fd_ = -1;
  char* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  size_t sqes_bytes_ = 0;
  uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, sq_mask_ = 0;
  uint32_t *cq_head_ = nullptr, *cq_tail_ = nullptr, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

}  // namespace probe
