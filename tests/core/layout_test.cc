// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "daemon/core/job.h"
#include "daemon/core/plan.h"
#include "proto/shm/format.h"
#include "tests/core/models.h"

namespace zerod::core {
namespace {

using ::testing::HasSubstr;

// core may not include the format; here its own constants are held against it.
TEST(LayoutTest, AgreesWithTheFormat) {
  const Layout layout = Units({1, 16 * 1024 + 1});
  EXPECT_EQ(layout.units()[0].elements, shm::kParamAlignElements);
  EXPECT_EQ(layout.units()[0].chunks, 1u);
  EXPECT_EQ(layout.units()[1].first_chunk, 1u);
  EXPECT_EQ(layout.units()[1].chunks, 2u);  // 64 KiB + 128 bytes
  EXPECT_EQ((16 * 1024) * sizeof(float), shm::kChunkBytes);
  ModelDescription model = Gpt(1);
  model.parameters[0].group = shm::kGroupsMax - 1;
  EXPECT_TRUE(Layout::Build(model, {}).ok());
  model.parameters[0].group = shm::kGroupsMax;
  EXPECT_THAT(Layout::Build(model, {}).status().message(), HasSubstr("in group 64"));
  EXPECT_EQ(kRingBytes, shm::PageUp(sizeof(shm::SubmitPage)) + shm::kTraceMax * 4 +
                            shm::PageUp(sizeof(shm::CompletePage)));
  for (uint64_t parameters : {1, 64, 65, 1000}) {
    EXPECT_EQ(StagedHeaderBytes(parameters), shm::StagedHeaderBytes(parameters));
  }
  EXPECT_EQ(kRoundsMax, shm::kRoundsMax);
  EXPECT_EQ(int(StateKind::kExpAvgSq), int(shm::StateKind::kExpAvgSq));
  EXPECT_EQ(int(StateKind::kGradient), int(shm::StateKind::kGradient));
  EXPECT_EQ(int(ScalarOp::kMax), int(shm::ScalarOp::kMax));
  EXPECT_EQ(int(StateKind::kMaster), int(shm::StateKind::kMaster));
  EXPECT_EQ(int(ScalarOp::kMean), int(shm::ScalarOp::kMean));
}

TEST(LayoutTest, HashIsTheSameInEveryProcessAndSeesEverything) {
  const Layout layout = *Layout::Build(Gpt(2), {});
  // Written down from another process: two daemons of different builds must find the same.
  EXPECT_EQ(layout.hash().Hex(), "3f256b1017207017549d7ab0085de4d8");
  const auto differs = [&](const std::function<void(ModelDescription*)>& edit) {
    ModelDescription model = Gpt(2);
    edit(&model);
    return !(Layout::Build(model, {})->hash() == layout.hash());
  };
  EXPECT_FALSE(differs([](ModelDescription*) {}));
  EXPECT_TRUE(differs([](ModelDescription* m) { m->parameters[3].name += "x"; }));
  EXPECT_TRUE(differs([](ModelDescription* m) { m->parameters[3].group = 1; }));
  EXPECT_TRUE(differs([](ModelDescription* m) { m->parameters[3].trainable = false; }));
  EXPECT_TRUE(differs([](ModelDescription* m) { m->dtype = DType::kBFloat16; }));
  EXPECT_TRUE(differs([](ModelDescription* m) { m->groups = {OptimizerKind::kLion}; }));
  EXPECT_FALSE(differs([](ModelDescription* m) { m->groups = {OptimizerKind::kAdam}; }));
  EXPECT_TRUE(differs([](ModelDescription* m) { std::swap(m->parameters[3].shape[0],
                                                          m->parameters[3].shape[1]); }));
  EXPECT_TRUE(differs([](ModelDescription* m) { std::swap(m->parameters[3], m->parameters[4]); }));
}

TEST(LayoutTest, ParametersAreAlignedAndTrainableOnesFirst) {
  ModelBuilder b;
  b.Module("", "M");
  b.Parameter("frozen", {33}, {""}, false).Parameter("a", {5}, {""});
  b.Parameter("empty", {0, 7}, {""}).Parameter("scalar", {}, {""});
  const Layout layout = *Layout::Build(b.model, {});
  const Unit& unit = layout.units().at(0);
  EXPECT_EQ(unit.parameters, (std::vector<uint32_t>{1, 2, 3, 0}));
  EXPECT_EQ(unit.trainable_elements, 96u);
  EXPECT_EQ(unit.elements, 160u);
  EXPECT_EQ(layout.parameter_elements(), 33u + 5 + 0 + 1);
  std::set<uint64_t> offsets;
  for (const Parameter& p : layout.parameters()) {
    EXPECT_EQ(p.offset % shm::kParamAlignElements, 0u) << p.name;
    EXPECT_TRUE(offsets.insert(p.offset).second) << p.name;
  }
}

TEST(LayoutTest, BlocksShrinkWithTheModelButNotBelow256) {
  EXPECT_EQ(Units({100}).block_elements(), 256u);
  EXPECT_EQ(Units({256 * 512}).block_elements(), 512u);
  EXPECT_EQ(Units({256 * 512 - 64}).block_elements(), 256u);
  EXPECT_EQ(Units({int64_t{1} << 30}).block_elements(), 64u * 1024);
}

TEST(LayoutTest, RefusesWhatMakesNoSense) {
  const auto message = [](const std::function<void(ModelDescription*)>& edit) {
    ModelDescription model = Gpt(1);
    edit(&model);
    return std::string(Layout::Build(model, {}).status().message());
  };
  EXPECT_THAT(message([](auto* m) { m->parameters.clear(); }), HasSubstr("no parameters"));
  EXPECT_THAT(message([](auto* m) { m->parameters[1].name = m->parameters[0].name; }),
              HasSubstr("listed twice"));
  EXPECT_THAT(message([](auto* m) { m->parameters[1].shape = {4, -1}; }),
              HasSubstr("negative dimension"));
  EXPECT_THAT(message([](auto* m) { m->parameters[1].shape = {1 << 30, 1 << 30, 1 << 30}; }),
              HasSubstr("more than 2^40"));
  EXPECT_THAT(message([](auto* m) {
                for (auto& p : m->parameters) p.shape = {int64_t{1} << 39};
              }), HasSubstr("more than 2^40"));
}

// However a unit is cut, its pieces are the same, and each is of one parameter and one block.
TEST(LayoutTest, TensorPiecesDoNotDependOnTheShards) {
  ModelDescription model = Gpt(6, 96);
  model.groups = {OptimizerKind::kLamb};
  const Layout layout = *Layout::Build(model, {});
  std::vector<bool> touched(layout.parameters().size(), true);
  touched[2] = false;
  EXPECT_TRUE(layout.AnyByTensor(touched));
  const uint64_t block = layout.block_elements();
  std::vector<uint64_t> covered(touched.size(), 0);
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    const auto whole = layout.TensorPieces(u, {0, layout.units()[u].elements}, touched);
    for (uint32_t members : {2u, 3u}) {
      const Partition partition(layout, members);
      size_t next = 0;
      for (MemberIndex m = 0; m < members; ++m) {
        for (const TensorPiece& piece : layout.TensorPieces(u, partition.Shard(u, m), touched)) {
          ASSERT_LT(next, whole.size());
          EXPECT_EQ(piece.parameter, whole[next].parameter);
          EXPECT_EQ(piece.elements.begin, whole[next].elements.begin);
          EXPECT_EQ(piece.elements.end, whole[next].elements.end);
          ++next;
        }
      }
      EXPECT_EQ(next, whole.size());
    }
    for (const TensorPiece& piece : whole) {
      covered[piece.parameter] += piece.elements.size();
      EXPECT_EQ(piece.elements.begin / block, (piece.elements.end - 1) / block);
    }
  }
  for (size_t p = 0; p < covered.size(); ++p) {
    EXPECT_EQ(covered[p], touched[p] ? layout.parameters()[p].elements : 0u) << p;
  }
  EXPECT_FALSE(layout.AnyByTensor(std::vector<bool>(touched.size(), false)));
  EXPECT_FALSE(Layout::Build(Gpt(1), {})->AnyByTensor(std::vector<bool>(touched.size(), true)));
}

ModelDescription MuonGpt(int blocks, int64_t width) {
  ModelDescription model = Gpt(blocks, width);
  model.groups = {OptimizerKind::kMuon, OptimizerKind::kAdam};
  for (ParameterDescription& p : model.parameters) {
    if (p.shape.size() < 2 || p.name.find("wte") != std::string::npos) p.group = 1;
  }
  return model;
}

TEST(PartitionTest, NoMatrixIsCut) {
  for (const int64_t width : {32, 96, 130}) {
    const Layout layout = *Layout::Build(MuonGpt(6, width), {});
    uint64_t largest = 0;
    for (const Unit& unit : layout.units()) {
      uint64_t end = 0;
      for (const uint32_t p : unit.parameters) {
        EXPECT_GE(layout.parameters()[p].offset, end);
        end = layout.parameters()[p].offset + layout.parameters()[p].elements;
      }
    }
    for (const uint32_t members : {2u, 3u, 5u, 8u}) {
      const Partition partition(layout, members);
      uint64_t most = 0;
      for (MemberIndex m = 0; m < members; ++m) {
        most = std::max(most, partition.ShardElements(m));
      }
      uint64_t total = 0;
      for (const Parameter& p : layout.parameters()) {
        if (!layout.IsByMatrix(p)) continue;
        ++total;
        largest = std::max(largest, p.elements + 2 * layout.block_elements());
        uint32_t owners = 0;
        for (MemberIndex m = 0; m < members; ++m) {
          const Range r = partition.Shard(p.unit, m);
          EXPECT_TRUE(r.empty() || r.begin % layout.block_elements() == 0);
          if (!Intersect(r, {p.offset, p.offset + p.elements}).empty()) ++owners;
        }
        EXPECT_EQ(owners, 1u) << p.name << " " << members;
      }
      EXPECT_EQ(total, 6u * 3 + 1);
      EXPECT_LE(most, layout.elements() / members + largest) << width << " " << members;
    }
  }
}

TEST(LayoutTest, MuonUpdatesMatricesAlone) {
  ModelDescription model = MuonGpt(1, 32);
  for (ParameterDescription& p : model.parameters) p.group = 0;
  const auto layout = Layout::Build(model, {});
  EXPECT_TRUE(absl::IsInvalidArgument(layout.status()));
  EXPECT_THAT(std::string(layout.status().message()), HasSubstr("h.0.ln.weight"));
}

class PartitionOf : public ::testing::TestWithParam<uint32_t> {};

TEST_P(PartitionOf, CutsWholeBlocksInOrderAndEvenly) {
  const uint32_t members = GetParam();
  for (const Layout& layout :
       {*Layout::Build(Gpt(6, 96), {}), Units({1, 300, 70000, 256, 5000, 12345, 40, 40, 40})}) {
    const Partition partition(layout, members);
    const uint64_t block = layout.block_elements();
    uint64_t total = 0;
    uint64_t least = UINT64_MAX;
    uint64_t most = 0;
    for (MemberIndex m = 0; m < members; ++m) {
      total += partition.ShardElements(m);
      least = std::min(least, partition.ShardElements(m));
      most = std::max(most, partition.ShardElements(m));
      EXPECT_LE(partition.TrainableShardElements(m), partition.ShardElements(m));
    }
    EXPECT_EQ(total, layout.elements());
    EXPECT_LE(most - least, 2 * block) << members;
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      uint64_t next = 0;
      uint64_t blocks = 0;
      for (MemberIndex m = 0; m < members; ++m) {
        const Range r = partition.Shard(u, m);
        EXPECT_EQ(r.begin, next);
        EXPECT_TRUE(r.empty() || r.begin % block == 0);
        EXPECT_TRUE(r.end % block == 0 || r.end == layout.units()[u].elements);
        next = r.end;
        blocks += layout.Blocks(r);
      }
      EXPECT_EQ(next, layout.units()[u].elements);
      EXPECT_EQ(blocks, layout.units()[u].blocks);
    }
  }
}

// Many units whose last block is nearly empty: the later members must not stay behind.
TEST(PartitionTest, ShortLastBlocksEvenOut) {
  const Layout layout = Units(std::vector<int64_t>(40, 256 * 7 + 1));
  ASSERT_EQ(layout.units()[0].blocks, 8u);
  for (uint32_t members : {2u, 4u}) {
    const Partition partition(layout, members);
    for (MemberIndex m = 1; m < members; ++m) {
      EXPECT_NEAR(static_cast<double>(partition.ShardElements(m)),
                  static_cast<double>(partition.ShardElements(0)), 2 * 256.0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Members, PartitionOf, ::testing::Range(1u, 8u));

}  // namespace
}  // namespace zerod::core
