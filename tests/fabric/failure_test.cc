// SPDX-License-Identifier: Apache-2.0
//
// How a Gloo fabric ends: stalls, aborts, destruction, members that never come or disagree.
#include <arpa/inet.h>
#include <dirent.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <thread>

#include <gtest/gtest.h>

#include "absl/strings/escaping.h"
#include "tests/fabric/members.h"

namespace zerod::fabric {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLargeBytes = 64 << 20;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

size_t CountEntries(const char* directory) {
  size_t count = 0;
  DIR* dir = opendir(directory);
  if (dir == nullptr) return 0;
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count;
}

FabricOptions Options(uint32_t size, absl::Duration stall = absl::Seconds(30)) {
  FabricOptions options;
  options.size = size;
  options.segment_bytes = 256 << 10;
  options.stall_timeout = stall;
  return options;
}

// A peer that lives but never starts its side of an exchange.
TEST(FailureTest, PeerThatNeverStartsIsAStall) {
  auto members = ConnectMembers(Options(2, absl::Milliseconds(500)));
  ASSERT_EQ(members.size(), 2u);
  std::vector<char> data(1000);
  const auto start = Clock::now();
  const absl::Status status =
      ExchangeAndWait(members[0].get(), 7, {}, {Transfer{1, data.data(), data.size()}});
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_NE(status.message().find("member 1"), absl::string_view::npos) << status;
  EXPECT_GE(SecondsSince(start), 0.4);
  EXPECT_LT(SecondsSince(start), 3.0);
}

// Traffic with a peer shows that it lives, but does not excuse it for ever.
TEST(FailureTest, BusyPeerMayKeepOneExchangeWaitingForALimitedTime) {
  auto members = ConnectMembers(Options(2, absl::Milliseconds(200)));
  ASSERT_EQ(members.size(), 2u);
  std::vector<char> data(1000);
  Results stuck(1);
  const auto start = Clock::now();
  members[0]->Exchange(1, {}, {Transfer{1, data.data(), data.size()}}, stuck.At(0));
  for (uint64_t tag = 2; stuck.finished() == 0 && SecondsSince(start) < 20; ++tag) {
    OnAll(2, [&](size_t rank) {
      char mine = 0, theirs = 0;
      const auto peer = static_cast<uint32_t>(1 - rank);
      // Fails together with the exchange that is stuck.
      (void)ExchangeAndWait(members[rank].get(), tag, {Transfer{peer, &mine, 1}},
                            {Transfer{peer, &theirs, 1}});
    });
  }
  ASSERT_TRUE(stuck.Await());
  EXPECT_EQ(stuck.status().code(), absl::StatusCode::kDeadlineExceeded) << stuck.status();
  EXPECT_GT(SecondsSince(start), 1.5) << "the peer was not silent";
}

// A size that members disagree about never meets; nothing is written to the buffer.
TEST(FailureTest, DisagreementAboutASizeWritesNothing) {
  auto members = ConnectMembers(Options(2, absl::Milliseconds(300)));
  ASSERT_EQ(members.size(), 2u);
  std::vector<char> out(2000, 'x'), in(1000, 'o');
  Results results(2);
  members[0]->Exchange(1, {Transfer{1, out.data(), 2000}}, {}, results.At(0));
  members[1]->Exchange(1, {}, {Transfer{0, in.data(), 1000}}, results.At(1));
  ASSERT_TRUE(results.Await());
  EXPECT_FALSE(results.status(0).ok());
  EXPECT_FALSE(results.status(1).ok());
  EXPECT_EQ(std::count(in.begin(), in.end(), 'o'), 1000);
}

// Abort in the middle of a large transfer: done comes soon on both sides, and the memory is
// left alone afterwards.
TEST(FailureTest, AbortDuringATransfer) {
  auto members = ConnectMembers(Options(2));
  ASSERT_EQ(members.size(), 2u);
  std::vector<char> out(kLargeBytes, 'x'), in(kLargeBytes, 'o');
  Results results(2);
  members[0]->Exchange(1, {Transfer{1, out.data(), kLargeBytes}}, {}, results.At(0));
  members[1]->Exchange(1, {}, {Transfer{0, in.data(), kLargeBytes}}, results.At(1));
  while (members[1]->counters().bytes_received == 0 && results.finished() == 0) {
    std::this_thread::yield();
  }
  const auto start = Clock::now();
  members[1]->Abort(absl::AbortedError("generation 2 begins"));
  ASSERT_TRUE(results.Await(std::chrono::seconds(5)));
  EXPECT_LT(SecondsSince(start), 1.0);
  EXPECT_EQ(results.status(1), absl::AbortedError("generation 2 begins"));
  EXPECT_EQ(results.status(0).code(), absl::StatusCode::kUnavailable) << results.status(0);
  std::memset(in.data(), 'w', kLargeBytes);
  members.clear();
  EXPECT_EQ(std::count(in.begin(), in.end(), 'w'), static_cast<ptrdiff_t>(kLargeBytes));
}

TEST(FailureTest, DestructionCallsEveryDone) {
  auto members = ConnectMembers(Options(2));
  ASSERT_EQ(members.size(), 2u);
  constexpr size_t kExchanges = 100;
  std::vector<std::vector<char>> data(kExchanges, std::vector<char>(1 << 20));
  Results results(kExchanges);
  for (size_t i = 0; i < kExchanges; ++i) {
    members[0]->Exchange(i, {}, {Transfer{1, data[i].data(), data[i].size()}}, results.At(i));
  }
  const auto start = Clock::now();
  members[0].reset();
  EXPECT_EQ(results.finished(), kExchanges);
  EXPECT_LT(SecondsSince(start), 1.0);
  for (size_t i = 0; i < kExchanges; ++i) {
    EXPECT_EQ(results.status(i).code(), absl::StatusCode::kAborted);
  }
}

// What a member has sent still arrives when it leaves at once.
TEST(FailureTest, LeavingAfterwardsLosesNothing) {
  for (int round = 0; round < 10; ++round) {
    auto members = ConnectMembers(Options(2));
    ASSERT_EQ(members.size(), 2u);
    std::vector<char> out(kLargeBytes / 16, 'x'), in(out.size(), 'o');
    Results receiver(1);
    members[1]->Exchange(1, {}, {Transfer{0, in.data(), in.size()}}, receiver.At(0));
    ASSERT_TRUE(
        ExchangeAndWait(members[0].get(), 1, {Transfer{1, out.data(), out.size()}}, {}).ok());
    members[0].reset();
    ASSERT_TRUE(receiver.Await());
    EXPECT_TRUE(receiver.status().ok()) << receiver.status();
    EXPECT_TRUE(in == out);
  }
}

TEST(FailureTest, PeerThatLeftIsGone) {
  auto members = ConnectMembers(Options(3));
  ASSERT_EQ(members.size(), 3u);
  members[2].reset();
  char data = 0;
  const absl::Status status = ExchangeAndWait(members[0].get(), 1, {}, {Transfer{2, &data, 1}});
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_NE(status.message().find("member 2"), absl::string_view::npos) << status;
  EXPECT_EQ(ExchangeAndWait(members[0].get(), 2, {}, {}), status) << "sticky";
}

// A peer that speaks nonsense is a lost peer, not the end of this process: Gloo throws in a
// thread of its own, where nobody else would catch.
TEST(FailureTest, NonsenseFromAPeerEndsTheFabricOnly) {
  MapRendezvous rendezvous;
  // Gloo's form of an address: sockaddr_storage and a number. One above 127.0.0.1 makes the
  // member wait for a call instead of calling.
  struct {
    sockaddr_storage socket = {};
    int64_t sequence = -1;
  } address;
  auto* inet = reinterpret_cast<sockaddr_in*>(&address.socket);
  inet->sin_family = AF_INET;
  inet->sin_addr.s_addr = htonl(0x7f000002);
  const absl::string_view raw(reinterpret_cast<char*>(&address), sizeof(address));
  ASSERT_TRUE(rendezvous.Set("fabric/gloo/1", "1 2 262144 " + absl::BytesToHexString(raw)).ok());

  std::promise<void> connected;
  std::thread impostor([&] {
    const std::string said = *rendezvous.Get("fabric/gloo/0", absl::Seconds(10));
    const std::string bytes = absl::HexStringToBytes(said.substr(said.rfind(' ') + 1));
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(bytes.data()), sizeof(sockaddr_in)), 0);
    connected.get_future().wait();
    // Payload (opcode 1) for a slot at which nothing is awaited.
    const uint64_t preamble[6] = {sizeof(preamble) + 100, 1, 0x5151, 0, 100, 0};
    EXPECT_EQ(send(fd, preamble, sizeof(preamble), 0), static_cast<ssize_t>(sizeof(preamble)));
    char end;
    while (recv(fd, &end, 1, 0) > 0) continue;
    close(fd);
  });
  auto made = ConnectGlooFabric(Options(2), &rendezvous);
  connected.set_value();
  EXPECT_TRUE(made.ok()) << made.status();
  if (made.ok()) {
    char data = 0;
    const absl::Status status = ExchangeAndWait(made->get(), 1, {}, {Transfer{1, &data, 1}});
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    made->reset();
  }
  impostor.join();
}

TEST(ConnectTest, NamesTheMembersThatNeverCame) {
  MapRendezvous rendezvous;
  FabricOptions options = Options(4);
  options.connect_timeout = absl::Milliseconds(300);
  OnAll(2, [&](size_t index) {
    FabricOptions own = options;
    own.rank = index == 0 ? 0 : 2;
    const auto start = Clock::now();
    auto made = ConnectGlooFabric(own, &rendezvous);
    EXPECT_EQ(made.status().code(), absl::StatusCode::kDeadlineExceeded) << made.status();
    EXPECT_NE(made.status().message().find("member 1, 3 of 4"), absl::string_view::npos)
        << made.status();
    EXPECT_LT(SecondsSince(start), 3.0);
  });
}

// A member that announced itself and died: nobody listens at, or calls from, its address.
TEST(ConnectTest, MemberThatDiedAfterAnnouncingIsNotWaitedForLonger) {
  MapRendezvous rendezvous;
  FabricOptions options = Options(2);
  options.connect_timeout = absl::Milliseconds(200);
  EXPECT_FALSE(ConnectGlooFabric(options, &rendezvous).ok());  // announces rank 0, gives up
  options.rank = 1;
  options.connect_timeout = absl::Milliseconds(500);
  const auto start = Clock::now();
  auto made = ConnectGlooFabric(options, &rendezvous);
  EXPECT_FALSE(made.ok());
  EXPECT_NE(made.status().message().find("member 0"), absl::string_view::npos) << made.status();
  EXPECT_LT(SecondsSince(start), 3.0);
}

// A member that announced itself and never calls: whoever waits for it may think better of it.
TEST(ConnectTest, IsEndedByItsCaller) {
  MapRendezvous before;
  FabricOptions options = Options(2);
  options.connect_timeout = absl::Milliseconds(200);
  EXPECT_FALSE(ConnectGlooFabric(options, &before).ok());
  // Of two members the one with the lower address is called: its own is lower than this one.
  std::string announced = *before.Get("fabric/gloo/0", absl::Seconds(1));
  const size_t host = announced.find("7f000001");
  ASSERT_NE(host, std::string::npos) << announced;
  announced.replace(host, 8, "7ffffffe");

  MapRendezvous rendezvous;
  ASSERT_TRUE(rendezvous.Set("fabric/gloo/0", announced).ok());
  options.rank = 1;
  options.connect_timeout = absl::Seconds(60);
  options.connect_cancel = std::make_shared<ConnectCancel>();
  std::thread caller([&] {
    EXPECT_TRUE(rendezvous.Get("fabric/gloo/1", absl::Seconds(30)).ok());
    options.connect_cancel->Cancel();
  });
  const auto start = Clock::now();
  EXPECT_EQ(ConnectGlooFabric(options, &rendezvous).status().code(),
            absl::StatusCode::kCancelled);
  EXPECT_LT(SecondsSince(start), 20.0);
  caller.join();
}

TEST(ConnectTest, RefusesUnequalMembersAndBadOptions) {
  MapRendezvous rendezvous;
  OnAll(2, [&](size_t rank) {
    FabricOptions own = Options(2);
    own.rank = static_cast<uint32_t>(rank);
    own.connect_timeout = absl::Seconds(5);
    own.segment_bytes += rank;
    auto made = ConnectGlooFabric(own, &rendezvous);
    EXPECT_EQ(made.status().code(), absl::StatusCode::kFailedPrecondition) << made.status();
  });
  MapRendezvous fresh;
  EXPECT_TRUE(fresh.Set("fabric/gloo/1", "1 2 262144 00ff").ok());
  EXPECT_EQ(ConnectGlooFabric(Options(2), &fresh).status().code(),
            absl::StatusCode::kFailedPrecondition);

  auto code = [&](FabricOptions options, Rendezvous* map) {
    return ConnectGlooFabric(options, map).status().code();
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  FabricOptions options = Options(2);
  EXPECT_EQ(code(options, nullptr), kInvalid);
  options.rank = 2;
  EXPECT_EQ(code(options, &rendezvous), kInvalid);
  for (const char* host : {"", "no.such.host.invalid", "192.0.2.1", "0.0.0.0", "::"}) {
    options = Options(2);
    options.bind_host = host;
    EXPECT_EQ(code(options, &rendezvous), kInvalid) << host;
  }
  options = Options(2);
  options.segment_bytes = 0;
  EXPECT_EQ(code(options, &rendezvous), kInvalid);
  options = Options(2);
  options.stall_timeout = absl::InfiniteDuration();
  EXPECT_EQ(code(options, &rendezvous), kInvalid);
}

TEST(ConnectTest, DeadRendezvousIsUnavailable) {
  MapRendezvous rendezvous;
  rendezvous.Close();
  EXPECT_EQ(ConnectGlooFabric(Options(2), &rendezvous).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST(LeakTest, BrokenFabricsLeaveNothingBehind) {
  auto make_and_break = [] {
    auto members = ConnectMembers(Options(2));
    ASSERT_EQ(members.size(), 2u);
    std::vector<char> data(1 << 20);
    Results results(1);
    members[0]->Exchange(1, {}, {Transfer{1, data.data(), data.size()}}, results.At(0));
    members[1]->Abort(absl::AbortedError("broken on purpose"));
    ASSERT_TRUE(results.Await());
  };
  make_and_break();
  const size_t descriptors = CountEntries("/proc/self/fd");
  const size_t threads = CountEntries("/proc/self/task");
  ASSERT_GT(descriptors, 0u);
  for (int i = 0; i < 20; ++i) make_and_break();
  EXPECT_EQ(CountEntries("/proc/self/fd"), descriptors);
  EXPECT_EQ(CountEntries("/proc/self/task"), threads);
}

}  // namespace
}  // namespace zerod::fabric
