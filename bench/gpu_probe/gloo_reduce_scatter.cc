// SPDX-License-Identifier: Apache-2.0
//
// Question 6: is a reduce-scatter made of point-to-point exchanges (each member sends every owner
// its slice, the owner adds them in rank order: what the daemon's fabric does) as good as Gloo's
// ReduceScatterHalvingDoubling, for sizes that do not divide evenly?
//
// What is done: R processes reduce-scatter COUNT floats, slices of ceil(COUNT / R), over both, in
// turns, after a warm-up; every result is compared with the exact sum. All runs in a network
// namespace of its own, so that its loopback interface counts these bytes alone, headers
// included. A case that does not end within 60 s is killed and reported as such.
//
// Build: ninja gloo_reduce_scatter (needs the target zerod_fabric)
// Run:   gloo_reduce_scatter [ROUNDS=7]    as root, or where user namespaces are allowed
// Read:  one entry per case "R x COUNT"; wire bytes are the sum over all members for one
//        reduce-scatter, beside `least_bytes` = (R-1) * COUNT * 4; times are the median over the
//        rounds of the slowest member. On a machine with fewer cores than R both pay for that.
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>

#include "bench/gpu_probe/probe.h"
#include "daemon/fabric/fabric.h"
#include "gloo/reduce_scatter.h"
#include "gloo/rendezvous/context.h"
#include "gloo/rendezvous/file_store.h"
#include "gloo/transport/tcp/device.h"

namespace probe {
namespace {

using zerod::fabric::ConnectGlooFabric;
using zerod::fabric::Fabric;
using zerod::fabric::FabricOptions;
using zerod::fabric::Transfer;

constexpr const char* kName = "gloo_reduce_scatter";
constexpr size_t kRanksMax = 8;
constexpr size_t kRoundsMax = 101;
constexpr int kExchange = 0, kHalving = 1;  // the two contenders

// One case's processes meet here. The members' barrier also hands over the figures.
struct Page {
  std::atomic<uint32_t> arrived{0};
  double seconds[2][kRoundsMax][kRanksMax];
  uint64_t wire_bytes[2][kRoundsMax];
  uint32_t wrong[2];        // results, over all members and rounds, the warm-up too
  uint32_t wrong_ranks[2];  // who had one: a bit each
  char failure[512];

  void Barrier(uint32_t ranks) {
    const uint32_t round = arrived.fetch_add(1) / ranks;
    while (arrived.load() < ranks * (round + 1)) sched_yield();
  }
};

class FolderRendezvous : public zerod::fabric::Rendezvous {
 public:
  explicit FolderRendezvous(std::string folder) : folder_(std::move(folder)) {}
  absl::Status Set(const std::string& key, const std::string& value) override {
    const std::string path = Path(key);
    std::ofstream(path + ".new", std::ios::binary) << value;
    std::filesystem::rename(path + ".new", path);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    const double deadline = NowSeconds() + absl::ToDoubleSeconds(timeout);
    while (NowSeconds() < deadline) {
      std::ifstream file(Path(key), std::ios::binary);
      if (file) return std::string(std::istreambuf_iterator<char>(file), {});
      usleep(1000);
    }
    return absl::DeadlineExceededError(key);
  }

 private:
  std::string Path(std::string key) const {
    std::replace(key.begin(), key.end(), '/', '_');
    return folder_ + "/" + key;
  }
  std::string folder_;
};

// Bytes that left by this namespace's loopback interface.
uint64_t LoopbackBytes() {
  std::ifstream file("/proc/self/net/dev");
  std::string line;
  while (std::getline(file, line)) {
    const size_t at = line.find("lo:");
    if (at != std::string::npos) return strtoull(line.c_str() + at + 3, nullptr, 10);
  }
  return 0;
}

// Puts this process in a network namespace with nothing but a loopback interface.
bool EnterOwnNetwork() {
  if (unshare(CLONE_NEWNET) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) return false;
  const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  ifreq request = {};
  snprintf(request.ifr_name, sizeof(request.ifr_name), "lo");
  request.ifr_flags = IFF_UP;
  const bool up = fd >= 0 && ioctl(fd, SIOCSIFFLAGS, &request) == 0;
  if (fd >= 0) close(fd);
  return up;
}

struct Slices {
  Slices(size_t elements, uint32_t ranks)
      : count(elements), each((elements + ranks - 1) / ranks) {}
  size_t begin(uint32_t rank) const { return std::min(count, rank * each); }
  size_t size(uint32_t rank) const { return begin(rank + 1) - begin(rank); }
  size_t count, each;
};

// Small integers: every order of summing gives the same exact float.
float Value(uint32_t rank, size_t i) { return static_cast<float>((i * 7 + rank * 13) % 251); }

void ExchangeReduceScatter(Fabric* fabric, uint64_t tag, const Slices& slices,
                           std::vector<float>* gradient, std::vector<float>* staging,
                           float* result) {
  const uint32_t me = fabric->rank();
  const size_t mine = slices.size(me);
  std::vector<Transfer> sends, receives;
  for (uint32_t peer = 0; peer < fabric->size(); ++peer) {
    if (peer == me) continue;
    sends.push_back(
        {peer, gradient->data() + slices.begin(peer), slices.size(peer) * sizeof(float)});
    receives.push_back({peer, staging->data() + peer * slices.each, mine * sizeof(float)});
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool finished = false;
  absl::Status outcome;
  fabric->Exchange(tag, sends, receives, [&](absl::Status status) {
    const std::lock_guard<std::mutex> lock(mutex);
    outcome = std::move(status);
    finished = true;
    changed.notify_one();
  });
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return finished; });
  if (!outcome.ok()) throw std::runtime_error(outcome.ToString());
  for (uint32_t rank = 0; rank < fabric->size(); ++rank) {
    const float* part = rank == me ? gradient->data() + slices.begin(me)
                                   : staging->data() + rank * slices.each;
    if (rank == 0) {
      memcpy(result, part, mine * sizeof(float));
    } else {
      for (size_t i = 0; i < mine; ++i) result[i] += part[i];
    }
  }
}

void Member(uint32_t rank, uint32_t ranks, size_t count, int rounds, const std::string& folder,
            Page* page) {
  const Slices slices(count, ranks);
  FolderRendezvous rendezvous(folder + "/fabric");
  FabricOptions options;
  options.rank = rank;
  options.size = ranks;
  auto fabric = ConnectGlooFabric(options, &rendezvous);
  if (!fabric.ok()) throw std::runtime_error(fabric.status().ToString());
  gloo::transport::tcp::attr attributes("127.0.0.1");
  auto device = gloo::transport::tcp::CreateDevice(attributes);
  gloo::rendezvous::FileStore store(folder + "/gloo");
  auto context = std::make_shared<gloo::rendezvous::Context>(static_cast<int>(rank),
                                                             static_cast<int>(ranks));
  context->connectFullMesh(store, device);
  std::vector<float> gradient(count), staging(slices.each * ranks), sum(slices.each);
  std::vector<int> counts;
  for (uint32_t r = 0; r < ranks; ++r) counts.push_back(static_cast<int>(slices.size(r)));
  gloo::ReduceScatterHalvingDoubling<float> halving(context, {gradient.data()},
                                                    static_cast<int>(count), counts);
  for (int round = -1; round < rounds; ++round) {
    for (const int contender : {kExchange, kHalving}) {
      for (size_t i = 0; i < count; ++i) gradient[i] = Value(rank, i);
      page->Barrier(ranks);
      const uint64_t bytes = LoopbackBytes();
      page->Barrier(ranks);
      const double start = NowSeconds();
      if (contender == kExchange) {
        ExchangeReduceScatter(fabric->get(), static_cast<uint64_t>(round + 2), slices, &gradient,
                              &staging, sum.data());
      } else {
        halving.run();
      }
      const double seconds = NowSeconds() - start;
      page->Barrier(ranks);
      if (round >= 0) page->seconds[contender][round][rank] = seconds;
      if (round >= 0 && rank == 0) page->wire_bytes[contender][round] = LoopbackBytes() - bytes;
      page->Barrier(ranks);
      const float* result = contender == kExchange ? sum.data() : gradient.data();
      bool right = true;
      for (size_t i = 0; i < slices.size(rank) && right; ++i) {
        float expected = 0;
        for (uint32_t r = 0; r < ranks; ++r) expected += Value(r, slices.begin(rank) + i);
        right = result[i] == expected;
      }
      if (!right) {
        __atomic_fetch_add(&page->wrong[contender], 1, __ATOMIC_RELAXED);
        __atomic_fetch_or(&page->wrong_ranks[contender], 1u << rank, __ATOMIC_RELAXED);
      }
    }
  }
  page->Barrier(ranks);
}

// Runs one case; returns "" or what failed.
std::string RunCase(uint32_t ranks, size_t count, int rounds, const std::string& folder,
                    Page* page) {
  for (const char* part : {"/fabric", "/gloo"}) {
    std::filesystem::remove_all(folder + part);
    std::filesystem::create_directories(folder + part);
  }
  new (page) Page();  // placement; tidy: allow
  std::vector<pid_t> members;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    members.push_back(Spawn([&] {
      try {
        Member(rank, ranks, count, rounds, folder, page);
        return kAnswered;
      } catch (const std::exception& error) {
        snprintf(page->failure, sizeof(page->failure), "%s", error.what());
        return kFailed;
      }
    }));
  }
  const double deadline = NowSeconds() + 60;
  std::string failure;
  for (const pid_t member : members) {
    // After a failure the others would spin in the barrier.
    const double left = failure.empty() ? std::max(deadline - NowSeconds(), 0.0) : 0.0;
    const int code = Await(member, left);
    if (failure.empty() && code == -1) failure = "did not end within 60 s";
    if (failure.empty() && code != 0) {
      failure = page->failure[0] != 0 ? page->failure : Format("a member ended with %d", code);
    }
  }
  return failure;
}

Figures Contender(const Page& page, int contender, uint32_t ranks, int rounds) {
  std::vector<double> slowest, bytes;
  for (int round = 0; round < rounds; ++round) {
    const double* seconds = page.seconds[contender][round];
    slowest.push_back(*std::max_element(seconds, seconds + ranks));
    bytes.push_back(static_cast<double>(page.wire_bytes[contender][round]));
  }
  Figures figures;
  figures.Number("ms", Quantile(slowest, 0.5) * 1e3)
      .Number("ms_least", Quantile(slowest, 0) * 1e3)
      .Number("wire_bytes", Quantile(bytes, 0.5))
      .Number("wrong_results", page.wrong[contender])
      .Number("wrong_rank_bits", page.wrong_ranks[contender]);
  return figures;
}

int Main(int argc, char** argv) {
  const int rounds =
      std::clamp(argc > 1 ? atoi(argv[1]) : 7, 1, static_cast<int>(kRoundsMax));
  Figures figures;
  figures.Number("cores", static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN)))
      .Number("rounds", rounds);
  if (!EnterOwnNetwork()) {
    return Finish(kName, kCannotBeHad, figures,
                  Format("No network namespace to count bytes in: %s.", strerror(errno)));
  }
  char folder[] = "/tmp/gloo_reduce_scatter.XXXXXX";
  if (mkdtemp(folder) == nullptr) return Finish(kName, kFailed, figures, "No folder in /tmp.");
  void* memory = mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                      -1, 0);
  if (memory == MAP_FAILED) return Finish(kName, kFailed, figures, "No shared page.");
  auto* page = static_cast<Page*>(memory);
  std::string sentence;
  bool exchange_right = true;
  for (const uint32_t ranks : {2u, 3u, 4u, 5u}) {
    for (const size_t count : {size_t{17}, size_t{100'003}, size_t{8'388'609}}) {
      const std::string failure = RunCase(ranks, count, rounds, folder, page);
      const std::string name = Format("%u x %zu", ranks, count);
      Figures of_case;
      of_case.Number("least_bytes", static_cast<double>((ranks - 1) * count * sizeof(float)));
      if (failure.empty()) {
        of_case.Raw("exchange", Contender(*page, kExchange, ranks, rounds).Json())
            .Raw("halving_doubling", Contender(*page, kHalving, ranks, rounds).Json());
        exchange_right = exchange_right && page->wrong[kExchange] == 0;
      } else {
        of_case.Text("failure", failure);
      }
      figures.Raw(name, of_case.Json());
      sentence += sentence.empty() ? "" : "; ";
      if (!failure.empty()) {
        sentence += name + ": " + failure;
        continue;
      }
      const auto median = [&](int contender) {
        std::vector<double> slowest;
        for (int k = 0; k < rounds; ++k) {
          const double* s = page->seconds[contender][k];
          slowest.push_back(*std::max_element(s, s + ranks));
        }
        return Quantile(slowest, 0.5) * 1e3;
      };
      sentence += Format("%s: exchange %.2f ms, halving-doubling %.2f ms%s", name.c_str(),
                         median(kExchange), median(kHalving),
                         page->wrong[kHalving] == 0 ? "" : " (WRONG results)");
    }
  }
  std::filesystem::remove_all(folder);
  return Finish(kName, exchange_right ? kAnswered : kFailed, figures, sentence + ".");
}

}  // namespace
}  // namespace probe

int main(int argc, char** argv) { return probe::Main(argc, argv); }
