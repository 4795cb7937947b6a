// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/models.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace zerod::ctl {
namespace {

enum class Family { kExample, kGpt2, kLlama };

struct Shape {
  const char* name;
  Family family;
  int64_t layers;
  int64_t width;
  int64_t vocabulary;
  int64_t positions;        // 0: none are learned
  int64_t inner;            // of the perceptron
  int64_t key_value_width;  // less than the width: several heads share keys and values
};

constexpr Shape kShapes[] = {
    {"train_gpt", Family::kExample, 6, 384, 256, 128, 1536, 384},
    {"gpt2-124m", Family::kGpt2, 12, 768, 50257, 1024, 3072, 768},
    {"gpt2-355m", Family::kGpt2, 24, 1024, 50257, 1024, 4096, 1024},
    {"gpt2-774m", Family::kGpt2, 36, 1280, 50257, 1024, 5120, 1280},
    {"gpt2-1.5b", Family::kGpt2, 48, 1600, 50257, 1024, 6400, 1600},
    {"llama-7b", Family::kLlama, 32, 4096, 32000, 0, 11008, 4096},
    {"llama-13b", Family::kLlama, 40, 5120, 32000, 0, 13824, 5120},
    {"llama-70b", Family::kLlama, 80, 8192, 32000, 0, 28672, 1024},
};

class Builder {
 public:
  explicit Builder(v1::Model* model) : model_(model) { Module("", "Model"); }

  void Module(const std::string& path, const std::string& type, bool container = false) {
    v1::Module* module = model_->add_modules();
    module->set_path(path);
    module->set_type(type);
    module->set_is_container(container);
  }
  void Parameter(const std::string& module, const std::string& attribute,
                 const std::vector<int64_t>& shape) {
    v1::Parameter* parameter = model_->add_parameters();
    parameter->set_name(absl::StrCat(module, ".", attribute));
    for (int64_t n : shape) parameter->add_shape(n);
    parameter->set_trainable(true);
    parameter->add_modules(module);
  }
  // A module of one weight, and a bias of `bias` elements where that is not 0.
  void Layer(const std::string& path, const std::string& type, const std::vector<int64_t>& weight,
             int64_t bias = 0) {
    Module(path, type);
    Parameter(path, "weight", weight);
    if (bias != 0) Parameter(path, "bias", {bias});
  }
  // The last module uses the first parameter too.
  void Tie(const std::string& path) {
    Module(path, "Linear");
    model_->mutable_parameters(0)->add_modules(path);
  }

 private:
  v1::Model* const model_;
};

void BuildExample(const Shape& s, Builder* b) {
  const int64_t w = s.width;
  b->Layer("tokens", "Embedding", {s.vocabulary, w});
  b->Layer("positions", "Embedding", {s.positions, w});
  b->Module("blocks", "ModuleList", /*container=*/true);
  for (int64_t i = 0; i < s.layers; ++i) {
    const std::string block = absl::StrCat("blocks.", i);
    b->Module(block, "Block");
    b->Layer(block + ".norm_1", "LayerNorm", {w}, w);
    b->Layer(block + ".qkv", "Linear", {3 * w, w}, 3 * w);
    b->Layer(block + ".out", "Linear", {w, w}, w);
    b->Layer(block + ".norm_2", "LayerNorm", {w}, w);
    b->Layer(block + ".inner", "Linear", {s.inner, w}, s.inner);
    b->Layer(block + ".outer", "Linear", {w, s.inner}, w);
  }
  b->Layer("norm", "LayerNorm", {w}, w);
  b->Layer("head", "Linear", {s.vocabulary, w});
}

void BuildGpt2(const Shape& s, Builder* b) {
  const int64_t w = s.width;
  b->Module("transformer", "GPT2Model");
  b->Layer("transformer.wte", "Embedding", {s.vocabulary, w});
  b->Layer("transformer.wpe", "Embedding", {s.positions, w});
  b->Module("transformer.h", "ModuleList", /*container=*/true);
  for (int64_t i = 0; i < s.layers; ++i) {
    const std::string block = absl::StrCat("transformer.h.", i);
    b->Module(block, "GPT2Block");
    b->Layer(block + ".ln_1", "LayerNorm", {w}, w);
    b->Module(block + ".attn", "GPT2Attention");
    b->Layer(block + ".attn.c_attn", "Conv1D", {w, 3 * w}, 3 * w);
    b->Layer(block + ".attn.c_proj", "Conv1D", {w, w}, w);
    b->Layer(block + ".ln_2", "LayerNorm", {w}, w);
    b->Module(block + ".mlp", "GPT2MLP");
    b->Layer(block + ".mlp.c_fc", "Conv1D", {w, s.inner}, s.inner);
    b->Layer(block + ".mlp.c_proj", "Conv1D", {s.inner, w}, w);
  }
  b->Layer("transformer.ln_f", "LayerNorm", {w}, w);
  b->Tie("lm_head");
}

void BuildLlama(const Shape& s, Builder* b) {
  const int64_t w = s.width;
  b->Module("model", "LlamaModel");
  b->Layer("model.embed_tokens", "Embedding", {s.vocabulary, w});
  b->Module("model.layers", "ModuleList", /*container=*/true);
  for (int64_t i = 0; i < s.layers; ++i) {
    const std::string block = absl::StrCat("model.layers.", i);
    b->Module(block, "LlamaDecoderLayer");
    b->Module(block + ".self_attn", "LlamaAttention");
    b->Layer(block + ".self_attn.q_proj", "Linear", {w, w});
    b->Layer(block + ".self_attn.k_proj", "Linear", {s.key_value_width, w});
    b->Layer(block + ".self_attn.v_proj", "Linear", {s.key_value_width, w});
    b->Layer(block + ".self_attn.o_proj", "Linear", {w, w});
    b->Module(block + ".mlp", "LlamaMLP");
    b->Layer(block + ".mlp.gate_proj", "Linear", {s.inner, w});
    b->Layer(block + ".mlp.up_proj", "Linear", {s.inner, w});
    b->Layer(block + ".mlp.down_proj", "Linear", {w, s.inner});
    b->Layer(block + ".input_layernorm", "LlamaRMSNorm", {w});
    b->Layer(block + ".post_attention_layernorm", "LlamaRMSNorm", {w});
  }
  b->Layer("model.norm", "LlamaRMSNorm", {w});
  b->Layer("lm_head", "Linear", {s.vocabulary, w});
}

}  // namespace

std::string ModelNames() {
  return absl::StrJoin(kShapes, ", ",
                       [](std::string* out, const Shape& s) { absl::StrAppend(out, s.name); });
}

absl::StatusOr<KnownModel> ModelByName(const std::string& name) {
  const auto* const shape =
      std::find_if(std::begin(kShapes), std::end(kShapes),
                   [&name](const Shape& s) { return name == s.name; });
  if (shape == std::end(kShapes)) {
    return absl::NotFoundError(absl::StrCat("there is no model ", name, "; known are ",
                                            ModelNames(), ", or give --params"));
  }
  KnownModel known;
  known.name = name;
  known.hidden_size = static_cast<uint64_t>(shape->width);
  Builder builder(&known.model);
  switch (shape->family) {
    case Family::kExample: BuildExample(*shape, &builder); break;
    case Family::kGpt2: BuildGpt2(*shape, &builder); break;
    case Family::kLlama: BuildLlama(*shape, &builder); break;
  }
  return known;
}

KnownModel UniformModel(uint64_t parameters) {
  // A block of width w has 12 w^2 elements, and transformers are some 100 times as wide as deep.
  // What is left is an embedding, about as large as a block.
  const double total = static_cast<double>(parameters);
  const int64_t layers = std::max<int64_t>(1, std::llround(std::cbrt(total / 120000)));
  const int64_t w =
      static_cast<int64_t>(std::sqrt(total / (12.0 * static_cast<double>(layers + 1)))) / 32 * 32;
  KnownModel known;
  known.name = absl::StrCat(parameters, " parameters");
  known.hidden_size = static_cast<uint64_t>(std::max<int64_t>(w, 1));
  Builder builder(&known.model);
  const int64_t blocks = w == 0 ? 0 : layers;
  builder.Layer("embedding", "Embedding",
                {static_cast<int64_t>(parameters) - blocks * 12 * w * w});
  builder.Module("blocks", "ModuleList", /*container=*/true);
  for (int64_t i = 0; i < blocks; ++i) {
    const std::string block = absl::StrCat("blocks.", i);
    builder.Module(block, "Block");
    builder.Layer(block + ".qkv", "Linear", {3 * w, w});
    builder.Layer(block + ".out", "Linear", {w, w});
    builder.Layer(block + ".inner", "Linear", {4 * w, w});
    builder.Layer(block + ".outer", "Linear", {w, 4 * w});
  }
  return known;
}

}  // namespace zerod::ctl
