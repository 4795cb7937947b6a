// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/units.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/core/models.h"

namespace zerod::core {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The unit of each parameter, by name.
std::map<std::string, std::string> Homes(const ModelDescription& model,
                                         const std::map<std::string, std::string>& overrides = {}) {
  const UnitAssignment a = *AssignUnits(model, overrides);
  std::map<std::string, std::string> homes;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    homes[model.parameters[i].name] = a.names[a.of[i]];
  }
  return homes;
}

TEST(UnitsTest, BlocksOfAGptAreUnitsAndATiedHeadBelongsToTheRoot) {
  const UnitAssignment tied = *AssignUnits(Gpt(3), {});
  EXPECT_THAT(tied.names, ElementsAre("", "wpe", "h.0", "h.1", "h.2", "ln_f"));
  const UnitAssignment untied = *AssignUnits(Gpt(3, 32, /*tied=*/false), {});
  EXPECT_THAT(untied.names, ElementsAre("wte", "wpe", "h.0", "h.1", "h.2", "ln_f", "lm_head"));
  EXPECT_EQ(Homes(Gpt(2)).at("h.1.attn.qkv.weight"), "h.1");
  EXPECT_EQ(Homes(Gpt(2)).at("wte.weight"), "");
}

TEST(UnitsTest, OneBlockAloneIsNoSiblingOfAnything) {
  const auto homes = Homes(Gpt(1));
  EXPECT_EQ(homes.at("h.0.attn.qkv.weight"), "h.0.attn.qkv");
  EXPECT_EQ(homes.at("h.0.ln.weight"), "h.0.ln");
}

TEST(UnitsTest, SequentialCountsByItsLikeParameterisedChildren) {
  ModelBuilder like;
  like.Module("", "Sequential", true).Module("0", "Linear").Module("1", "ReLU");
  like.Module("2", "Linear").Module("2.inner", "Scale");
  like.Parameter("0.w", {4}, {"0"}).Parameter("2.w", {4}, {"2"}).Parameter("2.inner.w", {4},
                                                                           {"2.inner"});
  EXPECT_EQ(Homes(like.model).at("2.inner.w"), "2");  // activations do not count
  like.model.modules[1].type = "Conv";
  EXPECT_EQ(Homes(like.model).at("2.inner.w"), "2.inner");
}

TEST(UnitsTest, ExpertsAreUnitsWithinTheirBlock) {
  ModelBuilder b;
  b.Module("", "MoE").Module("h", "ModuleList", true);
  for (const char* block : {"h.0", "h.1"}) {
    const std::string path = block;
    b.Module(path, "Block").Module(path + ".gate", "Linear");
    b.Module(path + ".experts", "ModuleList", true);
    b.Module(path + ".experts.0", "Expert").Module(path + ".experts.1", "Expert");
    b.Parameter(path + ".gate.w", {8}, {path + ".gate"});
    b.Parameter(path + ".experts.0.w", {8}, {path + ".experts.0"});
    b.Parameter(path + ".experts.1.w", {8}, {path + ".experts.1"});
  }
  // Used by two experts: their block's.
  b.Parameter("shared", {8}, {"h.1.experts.0", "h.1.experts.1"});
  const auto homes = Homes(b.model);
  EXPECT_EQ(homes.at("h.0.gate.w"), "h.0");
  EXPECT_EQ(homes.at("h.0.experts.1.w"), "h.0.experts.1");
  EXPECT_EQ(homes.at("shared"), "h.1");
}

TEST(UnitsTest, NamesOfSiblingsAreNotMistakenForEachOther) {
  ModelBuilder b;
  b.Module("", "M").Module("h1", "A").Module("h10", "B");
  b.Parameter("w", {4}, {"h1", "h10"});
  EXPECT_EQ(Homes(b.model).at("w"), "");
}

TEST(UnitsTest, OverridesWin) {
  const auto homes = Homes(Gpt(3), {{"h.0.attn", "attention"}, {"h.1", "pair"}, {"h.2", "pair"}});
  EXPECT_EQ(homes.at("h.0.attn.qkv.weight"), "h.0.attn");
  EXPECT_EQ(homes.at("h.0.ln.weight"), "h.0");
  EXPECT_EQ(homes.at("h.1.ln.weight"), "h");
  EXPECT_EQ(homes.at("h.2.mlp.0.weight"), "h");
}

TEST(UnitsTest, ALeafModuleIsOneUnitWithAllThatIsWithin) {
  ModelDescription model = Gpt(3);
  const auto leaf = [&model](const std::string& path) {
    for (ModuleDescription& m : model.modules) m.leaf |= m.path == path;
  };
  leaf("h.1.mlp");
  auto homes = Homes(model);
  EXPECT_EQ(homes.at("h.1.mlp.0.weight"), "h.1.mlp");
  EXPECT_EQ(homes.at("h.1.mlp.2.weight"), "h.1.mlp");
  EXPECT_EQ(homes.at("h.1.ln.weight"), "h.1");
  EXPECT_EQ(homes.at("h.2.mlp.0.weight"), "h.2");
  leaf("h");  // the outermost counts
  homes = Homes(model);
  EXPECT_EQ(homes.at("h.0.ln.weight"), "h");
  EXPECT_EQ(homes.at("h.1.mlp.0.weight"), "h");
  EXPECT_EQ(homes.at("wpe.weight"), "wpe");
  homes = Homes(model, {{"h.1", "h.1"}});  // and zerod.units before it
  EXPECT_EQ(homes.at("h.1.mlp.0.weight"), "h.1");
  EXPECT_EQ(homes.at("h.2.mlp.0.weight"), "h");
  leaf("");
  EXPECT_THAT(AssignUnits(model, {})->names, ElementsAre(""));
}

TEST(UnitsTest, MalformedDescriptionsAreErrors) {
  const auto message = [](const std::function<void(ModelDescription*)>& edit,
                          const std::map<std::string, std::string>& overrides = {}) {
    ModelDescription model = Gpt(2);
    edit(&model);
    const absl::Status status = AssignUnits(model, overrides).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(message([](auto* m) { m->modules.push_back(m->modules[1]); }), HasSubstr("twice"));
  EXPECT_THAT(message([](auto* m) { m->modules.erase(m->modules.begin()); }), HasSubstr("parent"));
  EXPECT_THAT(message([](auto* m) { m->modules.clear(); }), HasSubstr("root"));
  EXPECT_THAT(message([](auto* m) { m->modules.push_back({"x.y", "T"}); }), HasSubstr("parent"));
  EXPECT_THAT(message([](auto* m) { m->parameters[0].modules.clear(); }),
              HasSubstr("names no module"));
  EXPECT_THAT(message([](auto* m) { m->parameters[0].modules = {"nowhere"}; }),
              HasSubstr("'nowhere'"));
  EXPECT_THAT(message([](auto*) {}, {{"h.9", "x"}}), HasSubstr("'h.9'"));
}

}  // namespace
}  // namespace zerod::core
