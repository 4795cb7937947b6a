// SPDX-License-Identifier: Apache-2.0
//
// Descriptions of models for the tests of core.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/core/layout.h"

namespace zerod::core {

struct ModelBuilder {
  ModelDescription model;

  ModelBuilder& Module(const std::string& path, const std::string& type, bool container = false) {
    model.modules.push_back({path, type, container});
    return *this;
  }
  ModelBuilder& Parameter(const std::string& name, std::vector<int64_t> shape,
                          std::vector<std::string> modules, bool trainable = true) {
    ParameterDescription p;
    p.name = name;
    p.shape = std::move(shape);
    p.trainable = trainable;
    p.modules = std::move(modules);
    model.parameters.push_back(std::move(p));
    return *this;
  }
};

// A small GPT whose head is tied to the embedding.
inline ModelDescription Gpt(int blocks, int64_t width = 32, bool tied = true) {
  ModelBuilder b;
  b.Module("", "GPT").Module("wte", "Embedding").Module("wpe", "Embedding");
  b.Module("h", "ModuleList", true);
  for (int i = 0; i < blocks; ++i) {
    const std::string path = absl::StrCat("h.", i);
    b.Module(path, "Block").Module(path + ".ln", "LayerNorm").Module(path + ".attn", "Attention");
    b.Module(path + ".attn.qkv", "Linear").Module(path + ".mlp", "Sequential", true);
    b.Module(path + ".mlp.0", "Linear").Module(path + ".mlp.1", "GELU");
    b.Module(path + ".mlp.2", "Proj");
  }
  b.Module("ln_f", "LayerNorm").Module("lm_head", "Linear");
  std::vector<std::string> users = {"wte"};
  if (tied) users.push_back("lm_head");
  b.Parameter("wte.weight", {128, width}, users);
  b.Parameter("wpe.weight", {64, width}, {"wpe"});
  for (int i = 0; i < blocks; ++i) {
    const std::string path = absl::StrCat("h.", i);
    b.Parameter(path + ".ln.weight", {width}, {path + ".ln"});
    b.Parameter(path + ".attn.qkv.weight", {3 * width, width}, {path + ".attn.qkv"});
    b.Parameter(path + ".mlp.0.weight", {4 * width, width}, {path + ".mlp.0"});
    b.Parameter(path + ".mlp.2.weight", {width, 4 * width}, {path + ".mlp.2"});
  }
  b.Parameter("ln_f.weight", {width}, {"ln_f"});
  if (!tied) b.Parameter("lm_head.weight", {128, width}, {"lm_head"});
  return b.model;
}

// Units "u0", "u1", ...: one parameter of so many elements each.
inline Layout Units(const std::vector<int64_t>& elements) {
  ModelBuilder b;
  b.Module("", "Model");
  for (size_t i = 0; i < elements.size(); ++i) {
    const std::string path = absl::StrCat("u", i);
    b.Module(path, absl::StrCat("T", i)).Parameter(path + ".weight", {elements[i]}, {path});
  }
  return *Layout::Build(b.model, {});
}

}  // namespace zerod::core
