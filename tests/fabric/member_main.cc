// SPDX-License-Identifier: Apache-2.0
//
// One member of a job as a process of its own, for tests that kill, stop and cut off members.
//   fabric_member DIRECTORY RANK SIZE BIND_HOST STALL_MS BYTES
// Members find each other through files in DIRECTORY. Once connected it prints "connected", then
// exchanges BYTES with every other member over and over, printing "moving" after the first; when
// an exchange fails it prints "ended CODE MESSAGE", destroys the fabric, prints "destroyed", and
// exits with 0.
#include <fstream>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "daemon/fabric/fabric.h"

namespace zerod::fabric {
namespace {

class DirectoryRendezvous : public Rendezvous {
 public:
  explicit DirectoryRendezvous(std::string directory) : directory_(std::move(directory)) {}

  absl::Status Set(const std::string& key, const std::string& value) override {
    const std::string path = PathOf(key);
    std::ofstream(path + ".new") << value;
    if (std::rename((path + ".new").c_str(), path.c_str()) != 0) {
      return absl::InternalError("cannot write " + path);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
    do {
      std::ifstream file(PathOf(key));
      if (file) {
        std::stringstream value;
        value << file.rdbuf();
        return value.str();
      }
      // A file appears without telling. tidy: allow
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    } while (std::chrono::steady_clock::now() < deadline);
    return absl::DeadlineExceededError(key);
  }

 private:
  std::string PathOf(std::string key) {
    for (char& each : key) {
      if (each == '/') each = '_';
    }
    return directory_ + "/" + key;
  }
  std::string directory_;
};

// Runs exchanges until one fails; returns why.
absl::Status ExchangeUntilFailure(Fabric* fabric, size_t bytes) {
  std::vector<std::vector<char>> out(fabric->size(), std::vector<char>(bytes));
  std::vector<std::vector<char>> in = out;
  for (uint64_t tag = 0;; ++tag) {
    std::vector<Transfer> sends, receives;
    for (uint32_t peer = 0; peer < fabric->size(); ++peer) {
      if (peer == fabric->rank()) continue;
      sends.push_back(Transfer{peer, out[peer].data(), bytes});
      receives.push_back(Transfer{peer, in[peer].data(), bytes});
    }
    std::mutex mutex;
    std::condition_variable changed;
    bool finished = false;
    absl::Status result;
    fabric->Exchange(tag, sends, receives, [&](absl::Status status) {
      std::lock_guard<std::mutex> lock(mutex);
      result = std::move(status);
      finished = true;
      changed.notify_one();
    });
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return finished; });
    if (!result.ok()) return result;
    if (tag == 0) std::cout << "moving" << std::endl;
  }
}

int Main(char** argv) {
  FabricOptions options;
  DirectoryRendezvous rendezvous(argv[1]);
  options.rank = static_cast<uint32_t>(std::atoi(argv[2]));
  options.size = static_cast<uint32_t>(std::atoi(argv[3]));
  options.bind_host = argv[4];
  options.stall_timeout = absl::Milliseconds(std::atoi(argv[5]));
  options.connect_timeout = absl::Seconds(20);
  options.segment_bytes = 1 << 20;
  const size_t bytes = static_cast<size_t>(std::atoll(argv[6]));
  {
    auto fabric = ConnectGlooFabric(options, &rendezvous);
    if (!fabric.ok()) {
      std::cout << "failed " << fabric.status() << std::endl;
      return 1;
    }
    std::cout << "connected" << std::endl;
    const absl::Status status = ExchangeUntilFailure(fabric->get(), bytes);
    std::cout << "ended " << absl::StatusCodeToString(status.code()) << " " << status.message()
              << std::endl;
  }
  std::cout << "destroyed" << std::endl;
  return 0;
}

}  // namespace
}  // namespace zerod::fabric

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "see the head of member_main.cc\n";
    return 2;
  }
  return zerod::fabric::Main(argv);
}
