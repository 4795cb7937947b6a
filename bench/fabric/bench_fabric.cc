// SPDX-License-Identifier: Apache-2.0
//
// Two processes on this host hand each other a shard over the loopback interface, both ways at
// once: what an all-gather, or a reduce-scatter, between two members costs. Beside it the same
// bytes in the same run over a plain TCP socket with one blocking reader and one blocking writer
// in each process, which is about what the kernel gives.
//
//   bench_fabric [ROUNDS]
//
// GB/s = bytes that one member receives / time, 10^9 bytes; the median of ROUNDS (default 15)
// rounds, in which fabric and socket take turns. Memory is touched beforehand.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "daemon/fabric/fabric.h"

namespace zerod::fabric {
namespace {

// Two processes' rendezvous in a shared page; each sets one key. Also their barrier.
class SharedPage : public Rendezvous {
 public:
  absl::Status Set(const std::string& key, const std::string& value) override {
    Entry& entry = entries_[next_.fetch_add(1)];
    CHECK_LT(value.size(), sizeof(entry.value));
    std::snprintf(entry.key, sizeof(entry.key), "%s", key.c_str());
    std::snprintf(entry.value, sizeof(entry.value), "%s", value.c_str());
    entry.ready.store(true, std::memory_order_release);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    const auto end = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
    while (std::chrono::steady_clock::now() < end) {
      for (const Entry& entry : entries_) {
        if (entry.ready.load(std::memory_order_acquire) && key == entry.key) {
          return std::string(entry.value);
        }
      }
      sched_yield();
    }
    return absl::DeadlineExceededError(key);
  }
  void Barrier() {
    const uint32_t round = arrived_.fetch_add(1) / 2;
    while (arrived_.load() < 2 * (round + 1)) sched_yield();
  }
  std::atomic<uint16_t> port{0};

 private:
  struct Entry {
    std::atomic<bool> ready{false};
    char key[64];
    char value[1024];
  };
  Entry entries_[2];
  std::atomic<uint32_t> next_{0};
  std::atomic<uint32_t> arrived_{0};
};

int ConnectSockets(uint32_t rank, SharedPage* page) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  if (rank == 0) {
    CHECK_EQ(bind(fd, generic, length), 0);
    CHECK_EQ(listen(fd, 1), 0);
    CHECK_EQ(getsockname(fd, generic, &length), 0);
    page->port = address.sin_port;
    const int accepted = accept(fd, nullptr, nullptr);
    close(fd);
    fd = accepted;
  } else {
    while (page->port == 0) sched_yield();
    address.sin_port = page->port;
    CHECK_EQ(connect(fd, generic, length), 0);
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return fd;
}

void SocketExchange(int fd, const std::vector<char>& out, std::vector<char>* in, size_t bytes) {
  std::thread writer([&] {
    for (size_t at = 0; at < bytes;) {
      const ssize_t wrote = send(fd, out.data() + at, bytes - at, MSG_NOSIGNAL);
      CHECK_GT(wrote, 0);
      at += static_cast<size_t>(wrote);
    }
  });
  for (size_t at = 0; at < bytes;) {
    const ssize_t got = recv(fd, in->data() + at, bytes - at, 0);
    CHECK_GT(got, 0);
    at += static_cast<size_t>(got);
  }
  writer.join();
}

void FabricExchange(Fabric* fabric, uint64_t tag, std::vector<char>* out, std::vector<char>* in,
                    size_t bytes) {
  std::mutex mutex;
  std::condition_variable changed;
  bool finished = false;
  const uint32_t peer = 1 - fabric->rank();
  fabric->Exchange(tag, {Transfer{peer, out->data(), bytes}}, {Transfer{peer, in->data(), bytes}},
                   [&](absl::Status status) {
                     CHECK(status.ok()) << status;
                     std::lock_guard<std::mutex> lock(mutex);
                     finished = true;
                     changed.notify_one();
                   });
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return finished; });
}

template <typename Function>
double Seconds(SharedPage* page, Function function) {
  page->Barrier();
  const auto start = std::chrono::steady_clock::now();
  function();
  const auto end = std::chrono::steady_clock::now();
  page->Barrier();
  return std::chrono::duration<double>(end - start).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Member(uint32_t rank, SharedPage* page, int rounds) {
  const std::vector<size_t> sizes = {4 << 10, 256 << 10, 4 << 20, 32 << 20, 64 << 20};
  const int fd = ConnectSockets(rank, page);
  FabricOptions options;
  options.rank = rank;
  options.size = 2;
  auto fabric = ConnectGlooFabric(options, page);
  CHECK(fabric.ok()) << fabric.status();
  std::vector<char> out(sizes.back(), static_cast<char>('a' + rank)), in(sizes.back(), ' ');
  if (rank == 0) {
    std::printf("%12s %14s %14s %8s %12s %12s\n", "bytes", "fabric GB/s", "socket GB/s", "ratio",
                "fabric us", "socket us");
  }
  uint64_t tag = 0;
  for (size_t bytes : sizes) {
    std::vector<double> over_fabric, over_socket;
    for (int round = 0; round < rounds + 2; ++round) {
      const double a = Seconds(
          page, [&] { FabricExchange(fabric->get(), ++tag, &out, &in, bytes); });
      CHECK_EQ(in[0], static_cast<char>('b' - rank));
      CHECK_EQ(in[bytes - 1], static_cast<char>('b' - rank));
      std::memset(in.data(), ' ', bytes);
      const double b = Seconds(page, [&] { SocketExchange(fd, out, &in, bytes); });
      std::memset(in.data(), ' ', bytes);
      if (round < 2) continue;  // warms up
      over_fabric.push_back(a);
      over_socket.push_back(b);
    }
    if (rank != 0) continue;
    const double a = Median(over_fabric);
    const double b = Median(over_socket);
    const auto size = static_cast<double>(bytes);
    std::printf("%12zu %14.2f %14.2f %8.2f %12.0f %12.0f\n", bytes, size / a / 1e9,
                size / b / 1e9, b / a, a * 1e6, b * 1e6);
  }
  page->Barrier();
  close(fd);
}

int Main(int rounds) {
  void* memory = mmap(nullptr, sizeof(SharedPage), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  auto* page = std::construct_at(static_cast<SharedPage*>(memory));
  std::fflush(stdout);
  const pid_t child = fork();  // before any thread
  if (child == 0) {
    Member(1, page, rounds);
    _exit(0);
  }
  Member(0, page, rounds);
  int status = -1;
  waitpid(child, &status, 0);
  return status == 0 ? 0 : 1;
}

}  // namespace
}  // namespace zerod::fabric

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 15;
  return zerod::fabric::Main(std::max(rounds, 1));
}
