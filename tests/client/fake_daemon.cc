// SPDX-License-Identifier: Apache-2.0
#include "tests/client/fake_daemon.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.h"
#include "proto/shm/fd_socket.h"

namespace zerod::client {
namespace {

constexpr uint64_t kWindowChunks = 32;

uint64_t Chunks(const AttachPlan& plan) {
  uint64_t chunks = 0;
  for (const UnitPlan& unit : plan.units) chunks = std::max(chunks, unit.first_chunk + unit.chunks);
  return chunks;
}

}  // namespace

// root: parameters 0 (100 elements), 1 (32). a: 2 (40000), 3 (7). b: 4 (20000).
// frozen: 5 (10), not trainable.
AttachPlan FakeDaemon::MakePlan(bool node_sum) {
  AttachPlan plan;
  plan.generation = 3;
  plan.initialized = true;
  plan.units = {{"root", 160, 160, 0, 1, 0, true},
                {"layers.a", 40032, 40032, 1, 3, 4096, false},
                {"layers.b", 20000, 20000, 4, 2, 4096 + 163840, false},
                {"frozen", 32, 0, 6, 1, 0, false}};
  plan.parameters = {{"root.weight", 0, 0, 100, 0, true},
                     {"root.bias", 0, 128, 32, 1, true},
                     {"layers.a.weight", 1, 0, 40000, 2, true},
                     {"layers.a.bias", 1, 40000, 7, 3, true},
                     {"layers.b.weight", 2, 0, 20000, 4, true},
                     {"frozen.weight", 3, 0, 10, 5, false}};
  plan.window_chunks = kWindowChunks;
  plan.node_sum = node_sum;
  plan.staged_part_elements = node_sum ? uint64_t{1} << 20 : 0;
  plan.gradient_bytes = node_sum ? 2 * (64 + 40032 * 4 + 64) : 4096 + 163840 + 20000 * 4;
  plan.blob_offset = 8192;
  plan.transfer_bytes = 8192 + 4096;
  plan.resolved_config = "{}";
  return plan;
}

FakeDaemon::FakeDaemon(AttachPlan plan) : plan_(std::move(plan)) {
  const auto units = static_cast<uint32_t>(plan_.units.size());
  const uint64_t bytes[] = {
      shm::SubmitLayout(units, static_cast<uint32_t>(plan_.parameters.size())).total,
      shm::PageUp(sizeof(shm::CompletePage)),
      plan_.gradient_bytes,
      plan_.transfer_bytes,
      shm::UnitsLayout(units, Chunks(plan_)).total,
      plan_.window_chunks * shm::kChunkBytes};
  for (uint32_t i = 0; i < shm::kClientFiles; ++i) {
    files_[i].fd.Reset(memfd_create("fake", MFD_CLOEXEC));
    files_[i].bytes = bytes[i];
    CHECK(ftruncate(files_[i].fd.get(), static_cast<off_t>(bytes[i])) == 0);
    void* data = mmap(nullptr, std::max<uint64_t>(bytes[i], 1), PROT_READ | PROT_WRITE, MAP_SHARED,
                      files_[i].fd.get(), 0);
    CHECK(data != MAP_FAILED);
    files_[i].data = static_cast<std::byte*>(data);
  }
  auto* table = reinterpret_cast<shm::UnitTablePage*>(files_[4].data);
  *table = {shm::kMagic, shm::kFormatVersion, units, Chunks(plan_), 0};
  std::fill_n(chunk_table(), Chunks(plan_), shm::kNoChunk);
  shm::InitPages(reinterpret_cast<shm::SubmitPage*>(files_[0].data), complete());
  ring_ = std::make_unique<shm::ServeRing>(submit(), complete());
  doorbell_.Reset(*shm::MakeDoorbell());
  stop_.Reset(eventfd(0, EFD_CLOEXEC));
  int ends[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  socket_.Reset(ends[0]);
  client_socket_.Reset(ends[1]);
  // A place of its own for each unit.
  for (const UnitPlan& unit : plan_.units) {
    next_chunk_.push_back(static_cast<uint32_t>(unit.first_chunk));
  }
  handler_ = [this](const shm::SubmitEntry& entry) { return Default(entry); };
  thread_ = std::thread([this] { Run(); });
}

FakeDaemon::~FakeDaemon() {
  const uint64_t one = 1;
  CHECK(write(stop_.get(), &one, sizeof(one)) == sizeof(one));
  thread_.join();
  for (File& file : files_) munmap(file.data, std::max<uint64_t>(file.bytes, 1));
}

std::unique_ptr<Client> FakeDaemon::Attach(std::function<bool()> interrupt,
                                           std::function<void(const std::string&)> on_wait) {
  Attachment attachment;
  attachment.plan = plan_;
  attachment.address = "unix:/fake";
  attachment.client_state = "state";
  attachment.socket = std::move(client_socket_);
  for (File& file : files_) attachment.files.emplace_back(dup(file.fd.get()));
  attachment.files.emplace_back(dup(doorbell_.get()));
  attachment.interrupt = std::move(interrupt);
  attachment.on_wait = std::move(on_wait);
  attachment.wait_notice = absl::Milliseconds(20);
  absl::StatusOr<std::unique_ptr<Client>> client = NewClient(std::move(attachment));
  CHECK(client.ok()) << client.status();
  return *std::move(client);
}

void FakeDaemon::SetHandler(Handler handler) {
  std::lock_guard<std::mutex> lock(mu_);
  handler_ = std::move(handler);
}

FakeDaemon::Reply FakeDaemon::Default(const shm::SubmitEntry& entry) {
  if (entry.op == shm::Op::kGather) {
    Publish(entry.unit, static_cast<uint32_t>(entry.step - 1), next_chunk_[entry.unit],
            static_cast<float>(entry.unit));
  }
  return {};
}

void FakeDaemon::Publish(uint32_t unit, uint32_t version, uint32_t chunk, float value) {
  std::vector<uint32_t> chunks(plan_.units[unit].chunks);
  for (size_t i = 0; i < chunks.size(); ++i) chunks[i] = chunk + static_cast<uint32_t>(i);
  PublishAt(unit, version, chunks, value);
}

void FakeDaemon::PublishAt(uint32_t unit, uint32_t version, const std::vector<uint32_t>& chunks,
                           float value) {
  shm::UnitWord now = shm::UnpackUnitWord(word(unit)->load());
  uint32_t* const table = chunk_table() + plan_.units[unit].first_chunk;
  if (!std::equal(chunks.begin(), chunks.end(), table)) {
    now.epoch = (now.epoch + 1) & 0xffffff;
    std::copy(chunks.begin(), chunks.end(), table);
  }
  for (uint32_t chunk : chunks) {
    if (chunk >= plan_.window_chunks) continue;  // a damaged table
    std::fill_n(reinterpret_cast<float*>(files_[5].data + chunk * shm::kChunkBytes),
                shm::kChunkBytes / sizeof(float), value);
  }
  word(unit)->store(shm::PackUnitWord({version, now.epoch, shm::CopyState::kValid}));
}

void FakeDaemon::SetState(uint32_t unit, shm::CopyState state) {
  shm::UnitWord now = shm::UnpackUnitWord(word(unit)->load());
  now.state = state;
  word(unit)->store(shm::PackUnitWord(now));
}

void FakeDaemon::Fail(absl::StatusCode code, const std::string& text) {
  std::lock_guard<std::mutex> lock(mu_);
  ring_->Fail(code, text);
}

void FakeDaemon::HangUp() { shutdown(socket_.get(), SHUT_RDWR); }

void FakeDaemon::Complete(uint64_t cookie, uint64_t result) {
  std::lock_guard<std::mutex> lock(mu_);
  CHECK(ring_->Push({cookie, 0, 0, result, 0}).ok());
  ring_->Wake();
}

std::vector<shm::SubmitEntry> FakeDaemon::requests() {
  std::lock_guard<std::mutex> lock(mu_);
  return requests_;
}

void FakeDaemon::WaitForRequests(size_t count) {
  std::unique_lock<std::mutex> lock(mu_);
  const auto until = std::chrono::system_clock::now() + std::chrono::seconds(20);
  CHECK(received_.wait_until(lock, until, [&] { return requests_.size() >= count; }))
      << requests_.size() << " requests";
}

void FakeDaemon::Run() {
  for (;;) {
    bool idle;
    {
      std::lock_guard<std::mutex> lock(mu_);
      idle = ring_->PrepareSleep();
    }
    if (idle) {
      pollfd fds[] = {{doorbell_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
      poll(fds, 2, -1);
      if (fds[1].revents != 0) return;
      uint64_t rung;
      (void)!read(doorbell_.get(), &rung, sizeof(rung));
    }
    std::unique_lock<std::mutex> lock(mu_);
    ring_->CancelSleep();
    shm::SubmitEntry entry;
    for (;;) {
      absl::StatusOr<bool> popped = ring_->Pop(&entry);
      CHECK(popped.ok()) << popped.status();
      if (!*popped) break;
      requests_.push_back(entry);
      const Handler handler = handler_;
      lock.unlock();  // it may call Complete() or Fail()
      const Reply reply = handler(entry);
      lock.lock();
      if (entry.cookie != 0 && reply.answer) {
        CHECK(ring_->Push({entry.cookie, reply.code, 0, reply.result, 0}, reply.text).ok());
      }
      received_.notify_all();
    }
    ring_->Wake();
  }
}

uint32_t FakeDaemon::hold(uint32_t unit) const {
  const uint64_t at = shm::SubmitLayout(static_cast<uint32_t>(plan_.units.size()), 0).hold;
  return reinterpret_cast<std::atomic<uint32_t>*>(files_[0].data + at)[unit].load();
}

std::vector<uint32_t> FakeDaemon::trace() const {
  const uint64_t at = shm::SubmitLayout(static_cast<uint32_t>(plan_.units.size()), 0).trace;
  const auto* first = reinterpret_cast<const uint32_t*>(files_[0].data + at);
  return std::vector<uint32_t>(first, first + submit()->trace_len.load());
}

uint8_t FakeDaemon::touched(uint32_t index) const {
  const uint64_t at = shm::SubmitLayout(static_cast<uint32_t>(plan_.units.size()),
                                        static_cast<uint32_t>(plan_.parameters.size()))
                          .touched;
  return reinterpret_cast<const uint8_t*>(files_[0].data + at)[index];
}

const float* FakeDaemon::gradient(uint64_t byte_offset) const {
  return reinterpret_cast<const float*>(files_[2].data + byte_offset);
}

const uint8_t* FakeDaemon::gradient_bytes(uint64_t byte_offset) const {
  return reinterpret_cast<const uint8_t*>(files_[2].data + byte_offset);
}

const shm::SubmitPage* FakeDaemon::submit() const {
  return reinterpret_cast<const shm::SubmitPage*>(files_[0].data);
}

shm::CompletePage* FakeDaemon::complete() const {
  return reinterpret_cast<shm::CompletePage*>(files_[1].data);
}

std::atomic<uint64_t>* FakeDaemon::word(uint32_t unit) const {
  const uint64_t at = shm::UnitsLayout(static_cast<uint32_t>(plan_.units.size()), 0).word;
  return reinterpret_cast<std::atomic<uint64_t>*>(files_[4].data + at) + unit;
}

uint32_t* FakeDaemon::chunk_table() const {
  const uint64_t at = shm::UnitsLayout(static_cast<uint32_t>(plan_.units.size()), 0).chunk;
  return reinterpret_cast<uint32_t*>(files_[4].data + at);
}

absl::Status Land(Client& client, uint32_t parameter, float value) {
  const std::vector<float> gradient(client.parameters()[parameter].elements, value);
  return client.Land(parameter, gradient.data(), DType::kFloat32);
}

}  // namespace zerod::client
