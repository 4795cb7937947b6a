// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/wire.h"

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace zerod::server {
namespace {

core::HyperParameters SomeHyper() {
  core::HyperParameters hyper;
  hyper.max_norm = 1.5;
  hyper.loss_scale = 1024;
  hyper.want_norm = true;
  hyper.groups = {{1e-3, 0.9, 0.999, 1e-8, 0.01},
                  {2e-3, 0.8, 0.99, 1e-6, 0, 0.7, 0.1, 0.2, 0.3, false, false, true, 0.1, 7,
                   true, true}};
  return hyper;
}

void ExpectSomeHyper(const core::HyperParameters& hyper) {
  EXPECT_EQ(hyper.max_norm, 1.5);
  EXPECT_EQ(hyper.loss_scale, 1024);
  EXPECT_TRUE(hyper.want_norm);
  ASSERT_EQ(hyper.groups.size(), 2u);
  EXPECT_EQ(hyper.groups[1].lr, 2e-3);
  EXPECT_EQ(hyper.groups[1].beta1, 0.8);
  EXPECT_EQ(hyper.groups[1].beta2, 0.99);
  EXPECT_EQ(hyper.groups[1].eps, 1e-6);
  EXPECT_EQ(hyper.groups[0].weight_decay, 0.01);
  EXPECT_TRUE(hyper.groups[0].decoupled && hyper.groups[0].bias_correction);
  const core::Group rest{2e-3, 0.8, 0.99, 1e-6, 0, 0.7, 0.1, 0.2, 0.3, false, false, true, 0.1, 7,
                         true, true};
  EXPECT_TRUE(hyper.groups[1] == rest);
}

core::OptimizerProgress SomeProgress() {
  return {{0, 5, core::kCountMax}, core::LossScalerState{512, 9, 4, 2}};
}

core::Message FullReport() {
  core::Report report;
  report.generation = 7;
  report.items.push_back(core::Joined{{1, 2}, {3, 4}, 8, 2});
  report.items.push_back(core::ClientAttached{5});
  report.items.push_back(core::ClientGone{6, true, "left"});
  report.items.push_back(core::Want{1, uint64_t{1} << 40, true, true});
  report.items.push_back(core::GradientsReady{2, 9, 255});
  report.items.push_back(core::StepReady{9, false, "lr differs", SomeHyper(), {4, 5}});
  core::NormReady norm;
  norm.step = 9;
  norm.part.block_squares = {0.0, 1e300, -0.0, std::numeric_limits<double>::infinity()};
  norm.part.touched = {true, false, true, true, false, false, true, false, true};
  norm.part.nonfinite = true;
  report.items.push_back(norm);
  report.items.push_back(core::StateRequest{true, 1, 2, 3, 4, core::StateKind::kExpAvgSq});
  core::ScalarReady scalar;
  scalar.ordinal = 3;
  scalar.ranks = {0, 1};
  scalar.values = {{core::ScalarOp::kMax, {1.0, 2.0}, {}},
                   {core::ScalarOp::kSum, {}, Hash128{7, 8}}};
  scalar.restore = SomeProgress();
  report.items.push_back(scalar);
  report.items.push_back(core::Failed{absl::ResourceExhaustedError("no memory"), true});
  report.items.push_back(core::Forecasted{uint64_t{1} << 41});
  report.items.push_back(core::TensorsMeasured{9, {{1.5, 2.5}, {0.0, 1e300}}});
  return report;
}

core::Message FullAppend() {
  core::Append append;
  for (int kind = 0; kind <= static_cast<int>(core::kEntryKindLast); ++kind) {
    core::Entry e;
    e.seq = 100 + kind;
    e.generation = 2;
    e.kind = static_cast<core::EntryKind>(kind);
    e.unit = 3;
    e.step = 4;
    e.round = 5;
    e.wants = ~uint64_t{0};
    e.origin = 1;
    e.slot = 2;
    e.begin = 6;
    e.count = 7;
    e.state_kind = core::StateKind::kExpAvg;
    e.ordinal = 8;
    e.scalar = {core::ScalarOp::kMean, {3.25}, {}};
    e.rank = 9;
    e.reason = "because";
    if (e.kind == core::EntryKind::kCommit) {
      e.decision.kind = core::Decision::Kind::kSkip;
      e.decision.grad_norm = 2.5;
      e.decision.grad_scale = 0.125;
      e.decision.next_loss_scale = 4096;
      e.decision.loss_scaler = {4096, 12, -1, 3};
      e.decision.hyper = SomeHyper();
      e.decision.touched = std::vector<bool>(65, true);
      e.decision.reason = "nonfinite";
    }
    if (e.kind == core::EntryKind::kRestore) e.restore = SomeProgress();
    if (e.kind == core::EntryKind::kTensorNorms) e.squares = {{3, 4}, {0, 0.5}};
    append.entries.push_back(e);
  }
  return append;
}

std::vector<core::Message> Samples() {
  return {FullReport(), FullAppend(), core::FailJob{absl::AbortedError("over")}, core::Report{},
          core::Append{}};
}

TEST(Wire, WhatIsDecodedEncodesToTheSameBytes) {
  for (const core::Message& message : Samples()) {
    const std::string bytes = EncodeMessage(message);
    const auto decoded = DecodeMessage(bytes);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->index(), message.index());
    EXPECT_EQ(EncodeMessage(*decoded), bytes);
  }
}

TEST(Wire, FieldsArrive) {
  const auto report = DecodeMessage(EncodeMessage(FullReport()));
  ASSERT_TRUE(report.ok());
  const auto& items = std::get<core::Report>(*report).items;
  ASSERT_EQ(items.size(), std::variant_size_v<core::ReportItem>) << "a new item needs a sample";
  for (size_t i = 0; i < items.size(); ++i) EXPECT_EQ(items[i].index(), i);
  EXPECT_EQ(std::get<core::Joined>(items[0]).config, (Hash128{3, 4}));
  EXPECT_EQ(std::get<core::ClientGone>(items[2]).reason, "left");
  EXPECT_EQ(std::get<core::Want>(items[3]).version, uint64_t{1} << 40);
  ExpectSomeHyper(std::get<core::StepReady>(items[5]).hyper);
  EXPECT_EQ(std::get<core::StepReady>(items[5]).ranks, (std::vector<core::Rank>{4, 5}));
  EXPECT_EQ(std::get<core::NormReady>(items[6]).part.touched,
            (std::vector<bool>{true, false, true, true, false, false, true, false, true}));
  EXPECT_TRUE(std::get<core::Want>(items[3]).demand);
  EXPECT_TRUE(std::get<core::Want>(items[3]).again);
  EXPECT_TRUE(std::get<core::Failed>(items[9]).discard);
  EXPECT_TRUE(std::get<core::StateRequest>(items[7]).put);
  EXPECT_EQ(std::get<core::StateRequest>(items[7]).kind, core::StateKind::kExpAvgSq);
  const auto& scalar = std::get<core::ScalarReady>(items[8]);
  EXPECT_FALSE(scalar.values[0].restore.has_value());
  EXPECT_EQ(scalar.values[1].restore, (Hash128{7, 8}));
  EXPECT_TRUE(scalar.restore == SomeProgress());
  EXPECT_EQ(std::get<core::Forecasted>(items[10]).version, uint64_t{1} << 41);
  const auto& measured = std::get<core::TensorsMeasured>(items[11]);
  EXPECT_EQ(measured.step, 9u);
  EXPECT_EQ(measured.squares, (std::vector<core::TensorSquares>{{1.5, 2.5}, {0.0, 1e300}}));
  EXPECT_EQ(std::get<core::Failed>(items[9]).status, absl::ResourceExhaustedError("no memory"));

  const auto append = DecodeMessage(EncodeMessage(FullAppend()));
  ASSERT_TRUE(append.ok());
  for (const core::Entry& e : std::get<core::Append>(*append).entries) {
    EXPECT_EQ(e.wants, ~uint64_t{0});
    EXPECT_EQ(e.scalar.values, std::vector<double>{3.25});
    EXPECT_EQ(e.reason, "because");
    EXPECT_EQ(e.restore == SomeProgress(), e.kind == core::EntryKind::kRestore);
    if (e.kind == core::EntryKind::kTensorNorms) {
      EXPECT_EQ(e.squares, (std::vector<core::TensorSquares>{{3, 4}, {0, 0.5}}));
    }
    if (e.kind != core::EntryKind::kCommit) continue;
    EXPECT_EQ(e.decision.kind, core::Decision::Kind::kSkip);
    EXPECT_EQ(e.decision.grad_scale, 0.125);
    EXPECT_EQ(e.decision.next_loss_scale, 4096);
    EXPECT_TRUE(e.decision.loss_scaler == (core::LossScalerState{4096, 12, -1, 3}));
    EXPECT_EQ(e.decision.touched.size(), 65u);
    ExpectSomeHyper(e.decision.hyper);
  }
}

TEST(Wire, AFailureIsNeverOk) {
  const auto decoded = DecodeMessage(EncodeMessage(core::FailJob{absl::OkStatus()}));
  ASSERT_TRUE(decoded.ok());
  EXPECT_FALSE(std::get<core::FailJob>(*decoded).status.ok());
}

TEST(Wire, EveryPrefixAndEverySuffixIsRefused) {
  for (const core::Message& message : Samples()) {
    const std::string bytes = EncodeMessage(message);
    for (size_t length = 0; length < bytes.size(); ++length) {
      EXPECT_EQ(DecodeMessage(bytes.substr(0, length)).status().code(),
                absl::StatusCode::kInvalidArgument)
          << length;
    }
    EXPECT_FALSE(DecodeMessage(bytes + '\0').ok());
  }
}

TEST(Wire, AnotherVersionIsNamed) {
  std::string bytes = EncodeMessage(core::Report{});
  bytes[4] = 9;
  EXPECT_THAT(std::string(DecodeMessage(bytes).status().message()),
              testing::HasSubstr("message version 9, this one 3"));
}

TEST(Wire, LengthsThatCannotBeTrueTakeNoMemory) {
  // A report of 2^32-1 items in 23 bytes.
  std::string bytes = EncodeMessage(core::Report{});
  const uint32_t many = 0xffffffff;
  memcpy(bytes.data() + bytes.size() - 4, &many, 4);
  EXPECT_FALSE(DecodeMessage(bytes).ok());
}

// Whatever comes is refused, or is a message whose only encoding it is.
TEST(Wire, MutationsNeverDoHarm) {
  std::mt19937_64 random(20240611);
  std::vector<std::string> seeds;
  for (const core::Message& message : Samples()) seeds.push_back(EncodeMessage(message));
  int accepted = 0;
  for (int round = 0; round < 200000; ++round) {
    std::string bytes = seeds[random() % seeds.size()];
    const int mutations = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < mutations && !bytes.empty(); ++i) {
      // Mostly behind the header, which would refuse nearly everything.
      const size_t at = bytes.size() > 8 ? 6 + random() % (bytes.size() - 6) : 0;
      switch (random() % 5) {
        case 0: bytes[at] = static_cast<char>(random()); break;
        case 1: bytes[at] ^= static_cast<char>(1u << (random() % 8)); break;
        case 2: bytes.erase(at, 1 + random() % 8); break;
        case 3: bytes.insert(at, std::string(1 + random() % 8, static_cast<char>(random()))); break;
        case 4: bytes.resize(at); break;
      }
    }
    const auto decoded = DecodeMessage(bytes);
    if (!decoded.ok()) continue;
    ++accepted;
    ASSERT_EQ(EncodeMessage(*decoded), bytes) << "round " << round;
  }
  EXPECT_GT(accepted, 1000) << "the mutations no longer reach beyond the first check";
}

}  // namespace
}  // namespace zerod::server
