// SPDX-License-Identifier: Apache-2.0
//
// What every fabric must do, run over each kind, number of members and size of transfer.
#include <algorithm>
#include <random>
#include <string>
#include <tuple>

#include <gtest/gtest.h>

#include "tests/fabric/members.h"

namespace zerod::fabric {
namespace {

constexpr size_t kSegmentBytes = 64 << 10;

using Bytes = std::vector<unsigned char>;

// A content of its own for every (from, to, tag, order).
Bytes Content(size_t bytes, uint32_t from, uint32_t to, uint64_t tag, uint32_t order = 0) {
  std::minstd_rand random(static_cast<unsigned>(1 + from + 31 * to + 977 * tag + 7919 * order));
  Bytes out(bytes);
  for (auto& each : out) each = static_cast<unsigned char>(random() >> 7);
  return out;
}

class ConformanceTest : public testing::TestWithParam<std::tuple<uint32_t, size_t>> {
 protected:
  void SetUp() override {
    const uint32_t members = std::get<0>(GetParam());
    if (members == 1) {
      fabrics_.push_back(MakeLoopbackFabric());
      return;
    }
    FabricOptions options;
    options.size = members;
    options.segment_bytes = kSegmentBytes;
    fabrics_ = ConnectMembers(options);
    ASSERT_EQ(fabrics_.size(), members);
  }
  uint32_t size() const { return static_cast<uint32_t>(fabrics_.size()); }
  size_t bytes() const { return std::get<1>(GetParam()); }

  // Everyone sends a message of its own to everyone, itself included. Checks what arrives.
  void AllToAll(uint32_t rank, uint64_t tag) {
    std::vector<Bytes> out(size()), in(size(), Bytes(bytes(), 0xee));
    std::vector<Transfer> sends, receives;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      out[peer] = Content(bytes(), rank, peer, tag);
      sends.push_back(Transfer{peer, out[peer].data(), bytes()});
      receives.push_back(Transfer{peer, in[peer].data(), bytes()});
    }
    const absl::Status status = ExchangeAndWait(fabrics_[rank].get(), tag, sends, receives);
    ASSERT_TRUE(status.ok()) << status;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      EXPECT_TRUE(in[peer] == Content(bytes(), peer, rank, tag)) << peer << " to " << rank;
    }
  }

  std::vector<std::unique_ptr<Fabric>> fabrics_;
};

TEST_P(ConformanceTest, KnowsItsPlace) {
  for (uint32_t rank = 0; rank < size(); ++rank) {
    EXPECT_EQ(fabrics_[rank]->rank(), rank);
    EXPECT_EQ(fabrics_[rank]->size(), size());
    EXPECT_EQ(fabrics_[rank]->name(), size() == 1 ? "loopback" : "gloo");
  }
}

TEST_P(ConformanceTest, AllGatherWithSelfCopy) {
  OnAll(size(), [this](size_t index) {
    const auto rank = static_cast<uint32_t>(index);
    Bytes shard = Content(bytes(), rank, 0, 5);
    Bytes window(bytes() * size(), 0xee);
    std::vector<Transfer> sends, receives;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      sends.push_back(Transfer{peer, shard.data(), bytes()});
      receives.push_back(Transfer{peer, window.data() + peer * bytes(), bytes()});
    }
    const absl::Status status = ExchangeAndWait(fabrics_[rank].get(), 5, sends, receives);
    ASSERT_TRUE(status.ok()) << status;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      const Bytes expected = Content(bytes(), peer, 0, 5);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), window.begin() + peer * bytes()));
    }
  });
}

TEST_P(ConformanceTest, AllToAllRepeatedly) {
  OnAll(size(), [this](size_t rank) {
    for (uint64_t tag = 1; tag <= 5; ++tag) AllToAll(static_cast<uint32_t>(rank), tag);
  });
}

// Twenty exchanges at once, each member starting them in an order of its own.
TEST_P(ConformanceTest, OverlappingExchangesInAnyOrder) {
  constexpr uint64_t kExchanges = 20;
  OnAll(size(), [this](size_t index) {
    const auto rank = static_cast<uint32_t>(index);
    std::vector<uint64_t> order(kExchanges);
    for (uint64_t i = 0; i < kExchanges; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::minstd_rand(rank + 1));
    std::vector<std::vector<Bytes>> out(kExchanges), in(kExchanges);
    Results results(kExchanges);
    for (uint64_t i : order) {
      const uint64_t tag = 1000 * i;
      std::vector<Transfer> sends, receives;
      for (uint32_t peer = 0; peer < size(); ++peer) {
        out[i].push_back(Content(bytes(), rank, peer, tag));
        in[i].push_back(Bytes(bytes(), 0xee));
      }
      for (uint32_t peer = 0; peer < size(); ++peer) {
        sends.push_back(Transfer{peer, out[i][peer].data(), bytes()});
        receives.push_back(Transfer{peer, in[i][peer].data(), bytes()});
      }
      fabrics_[rank]->Exchange(tag, sends, receives, results.At(i));
    }
    ASSERT_TRUE(results.Await());
    for (uint64_t i = 0; i < kExchanges; ++i) {
      ASSERT_TRUE(results.status(i).ok()) << results.status(i);
      for (uint32_t peer = 0; peer < size(); ++peer) {
        EXPECT_TRUE(in[i][peer] == Content(bytes(), peer, rank, 1000 * i)) << i;
      }
    }
  });
}

// Several transfers between each pair meet in the order given, empty and unequal ones included.
TEST_P(ConformanceTest, SeveralTransfersForOnePair) {
  OnAll(size(), [this](size_t index) {
    const auto rank = static_cast<uint32_t>(index);
    const std::vector<size_t> sizes = {bytes(), 0, bytes(), bytes() / 2, 3, bytes()};
    std::vector<Bytes> out, in;
    std::vector<Transfer> sends, receives;
    for (uint32_t order = 0; order < sizes.size(); ++order) {
      for (uint32_t peer = 0; peer < size(); ++peer) {
        out.push_back(Content(sizes[order], rank, peer, 9, order));
        in.push_back(Bytes(sizes[order], 0xee));
        sends.push_back(Transfer{peer, out.back().data(), sizes[order]});
        receives.push_back(Transfer{peer, in.back().data(), sizes[order]});
      }
    }
    const absl::Status status = ExchangeAndWait(fabrics_[rank].get(), 9, sends, receives);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t i = 0; i < in.size(); ++i) {
      const auto order = static_cast<uint32_t>(i / size());
      const auto peer = static_cast<uint32_t>(i % size());
      EXPECT_TRUE(in[i] == Content(sizes[order], peer, rank, 9, order)) << order;
    }
  });
}

TEST_P(ConformanceTest, BuffersAreReused) {
  OnAll(size(), [this](size_t index) {
    const auto rank = static_cast<uint32_t>(index);
    const uint32_t next = (rank + 1) % size();
    const uint32_t previous = (rank + size() - 1) % size();
    Bytes out(bytes()), in(bytes());
    for (uint64_t tag = 0; tag < 10; ++tag) {
      const Bytes content = Content(bytes(), rank, next, tag);
      std::copy(content.begin(), content.end(), out.begin());
      const absl::Status status =
          ExchangeAndWait(fabrics_[rank].get(), tag, {Transfer{next, out.data(), bytes()}},
                          {Transfer{previous, in.data(), bytes()}});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_TRUE(in == Content(bytes(), previous, rank, tag)) << tag;
    }
  });
}

TEST_P(ConformanceTest, SendWaitsForALateReceiver) {
  const uint32_t last = size() - 1;
  Bytes out = Content(bytes(), 0, last, 3), in(bytes());
  Results sender(1), receiver(1);
  if (size() == 1) GTEST_SKIP() << "a copy has no late side";
  fabrics_[0]->Exchange(3, {Transfer{last, out.data(), bytes()}}, {}, sender.At(0));
  // Another exchange passes meanwhile, so the send was posted before its receive.
  OnAll(size(), [this](size_t rank) { AllToAll(static_cast<uint32_t>(rank), 4); });
  fabrics_[last]->Exchange(3, {}, {Transfer{0, in.data(), bytes()}}, receiver.At(0));
  ASSERT_TRUE(sender.Await() && receiver.Await());
  EXPECT_TRUE(sender.status().ok() && receiver.status().ok());
  EXPECT_TRUE(in == out);
}

TEST_P(ConformanceTest, CountsPayloadThatLeaves) {
  OnAll(size(), [this](size_t rank) { AllToAll(static_cast<uint32_t>(rank), 2); });
  for (auto& fabric : fabrics_) {
    const Counters counters = fabric->counters();
    EXPECT_EQ(counters.bytes_sent, bytes() * (size() - 1));
    EXPECT_EQ(counters.bytes_received, bytes() * (size() - 1));
    EXPECT_EQ(counters.exchanges, 1u);
    EXPECT_EQ(counters.failures, 0u);
  }
}

TEST_P(ConformanceTest, EmptyExchangeCompletes) {
  EXPECT_TRUE(ExchangeAndWait(fabrics_[0].get(), 1, {}, {}).ok());
}

TEST_P(ConformanceTest, InvalidPeerIsStickyForAll) {
  Bytes data(8);
  const absl::Status first =
      ExchangeAndWait(fabrics_[0].get(), 1, {Transfer{size(), data.data(), 8}}, {});
  EXPECT_EQ(first.code(), absl::StatusCode::kInvalidArgument) << first;
  const absl::Status second = ExchangeAndWait(fabrics_[0].get(), 2, {}, {});
  EXPECT_EQ(second, first);
  EXPECT_EQ(fabrics_[0]->counters().failures, 2u);
}

TEST_P(ConformanceTest, AbortIsSticky) {
  fabrics_[0]->Abort(absl::AbortedError("generation 2 begins"));
  fabrics_[0]->Abort(absl::AbortedError("a second reason is not heard"));
  for (uint64_t tag = 1; tag <= 2; ++tag) {
    const absl::Status status = ExchangeAndWait(fabrics_[0].get(), tag, {}, {});
    EXPECT_EQ(status, absl::AbortedError("generation 2 begins"));
  }
}

TEST_P(ConformanceTest, DoneMayStartTheNextExchange) {
  OnAll(size(), [this](size_t rank) {
    constexpr uint64_t kChain = 50;
    Results last(1);
    Fabric* fabric = fabrics_[rank].get();
    std::function<void(uint64_t)> start = [&](uint64_t tag) {
      fabric->Exchange(tag, {}, {}, [&, tag](absl::Status status) {
        if (tag == kChain) return last.At(0)(status);
        start(tag + 1);
      });
    };
    start(1);
    ASSERT_TRUE(last.Await());
    EXPECT_TRUE(last.status().ok());
  });
}

INSTANTIATE_TEST_SUITE_P(
    Fabrics, ConformanceTest,
    testing::Combine(testing::Values(1u, 2u, 3u, 4u),
                     testing::Values(size_t{0}, size_t{1}, size_t{4097},
                                     10 * kSegmentBytes + 13)),
    [](const testing::TestParamInfo<ConformanceTest::ParamType>& each) {
      const uint32_t members = std::get<0>(each.param);
      return (members == 1 ? std::string("loopback1") : "gloo" + std::to_string(members)) +
             "_bytes" + std::to_string(std::get<1>(each.param));
    });

}  // namespace
}  // namespace zerod::fabric
