// SPDX-License-Identifier: Apache-2.0
#include "base/config.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/config_json.h"
#include "base/config_keys.h"

namespace zerod {
namespace {

constexpr char kTrainBatch[] = "train_batch_size";
constexpr char kMicroBatch[] = "train_micro_batch_size_per_gpu";
constexpr char kAccumulation[] = "gradient_accumulation_steps";

// Reads the keys of one block and of the blocks within; how deep is bounded by the table.
void ReadBlock(const Json& object, const std::string& block, Config* config,
               ConfigProblems* problems) {
  for (const auto& [key, value] : object.items()) {
    const std::string path = JoinPath(block, key);
    if (const ServedKey* served = FindServedKey(path)) {
      if (!value.is_null()) ReadKey(*served, value, config, problems);
    } else if (!IsServedBlock(path)) {
      RefuseKey(block, key, problems);
    } else if (value.is_object()) {
      ReadBlock(value, path, config, problems);
    } else if (value == "auto") {
      problems->Add(path, kAutoIsLater);
    } else if (!value.is_null()) {
      problems->Add(path, Abbreviated(value) + " is not allowed; it must be an object");
    }
  }
}

// Of a dotted path.
Json::json_pointer Pointer(absl::string_view path) {
  return Json::json_pointer(absl::StrCat("/", absl::StrReplaceAll(path, {{".", "/"}})));
}

// True where `path` is in the document and not null.
bool Given(const Json& document, absl::string_view path) {
  const Json::json_pointer pointer = Pointer(path);
  return document.contains(pointer) && !document.at(pointer).is_null();
}

// Fills in what is missing of the batch triangle, where 0 stands for missing.
void DeriveBatch(uint64_t world, Config* config, ConfigProblems* problems) {
  for (const char* key : {kTrainBatch, kMicroBatch, kAccumulation}) {
    if (problems->Concerns(key)) return;  // nothing follows from a wrong value
  }
  uint64_t& train = config->train_batch_size;
  uint64_t& micro = config->micro_batch_size;
  uint64_t& accumulation = config->gradient_accumulation_steps;
  if (train == 0 && micro == 0) {
    problems->Add(kTrainBatch, absl::StrCat("is missing; give it or ", kMicroBatch));
    return;
  }
  if (train != 0 && micro != 0) {
    if (accumulation == 0) accumulation = train / micro / world;
  } else {
    if (accumulation == 0) accumulation = 1;
    if (train != 0) micro = train / world / accumulation;
  }
  using Wide = unsigned __int128;  // 2^40 x 2^40 x 2^32 at most
  const Wide product = static_cast<Wide>(micro) * accumulation * world;
  const Wide train_max = static_cast<Wide>(FindServedKey(kTrainBatch)->max);
  if (product > train_max) {
    problems->Add(kTrainBatch,
                  absl::StrCat("is ", kMicroBatch, " ", micro, " x ", kAccumulation, " ",
                               accumulation, " x ", world, " ranks, which is more than ",
                               static_cast<uint64_t>(train_max), "; make one of them smaller"));
    return;
  }
  if (train == 0) train = static_cast<uint64_t>(product);
  if (product != train) {
    problems->Add(kTrainBatch,
                  absl::StrCat(train, " is not ", kMicroBatch, " ", micro, " x ", kAccumulation,
                               " ", accumulation, " x ", world, " ranks = ",
                               static_cast<uint64_t>(product), "; change one of them"));
  }
}

void CheckOptimizer(const Json& document, ConfigProblems* problems) {
  if (Given(document, "optimizer") && !Given(document, "optimizer.type") &&
      !problems->Concerns("optimizer.type") && document["optimizer"].is_object()) {
    problems->Add("optimizer.type",
                  "is missing; it must be \"AdamW\", or leave out \"optimizer\" and pass one");
  }
}

void ResolveScheduler(const Json& document, Config* config, ConfigProblems* problems) {
  if (!Given(document, "scheduler") || !document["scheduler"].is_object()) return;
  if (!Given(document, "scheduler.type")) {
    problems->Add("scheduler.type", "is missing; it must be \"WarmupLR\", or leave out "
                                    "\"scheduler\" for a constant learning rate");
    return;
  }
  if (problems->Concerns("scheduler") || problems->Concerns("optimizer")) return;
  Config::Scheduler& scheduler = config->scheduler;
  constexpr char kMax[] = "scheduler.params.warmup_max_lr";
  const bool given = Given(document, kMax);
  if (!given && config->optimizer.type.empty()) {
    problems->Add(kMax, "is missing; give it, as there is no optimizer.params.lr to take it from");
    return;
  }
  if (!given) scheduler.warmup_max_lr = config->optimizer.lr;
  if (scheduler.warmup_min_lr > scheduler.warmup_max_lr) {
    problems->Add("scheduler.params.warmup_min_lr",
                  absl::StrCat(Json(scheduler.warmup_min_lr).dump(),
                               " is not allowed; it must be at most warmup_max_lr, which is ",
                               Json(scheduler.warmup_max_lr).dump(),
                               given ? "" : " (optimizer.params.lr)"));
  }
}

}  // namespace

absl::StatusOr<Config> Config::Parse(absl::string_view json, uint32_t world) {
  ConfigProblems problems;
  const Json document = ParseStrictJson(json, &problems);
  if (!problems.empty() && document.is_null()) return problems.ToStatus();
  if (!document.is_object()) {
    problems.Add("", absl::StrCat("the configuration is ", Abbreviated(document),
                                  "; it must be a JSON object"));
    return problems.ToStatus();
  }
  Config config;
  ReadBlock(document, "", &config, &problems);
  if (world == 0) {
    problems.Add("world", "0 is not allowed; a job has at least one rank");
  } else {
    DeriveBatch(world, &config, &problems);
  }
  CheckOptimizer(document, &problems);
  ResolveScheduler(document, &config, &problems);
  if (config.zerod.master_remainder && !config.bf16 && !problems.Concerns("bf16")) {
    problems.Add("zerod.master_remainder",
                 "true is not allowed without bf16.enabled: an fp32 window is the master already");
  }
  if (config.gradient_clipping < 0) config.gradient_clipping = 0;
  if (!problems.empty()) return problems.ToStatus();
  return config;
}

std::string Config::ToJson() const {
  Json document = Json::object();
  Config copy = *this;  // a slot is of a configuration that may be written
  for (const ServedKey& key : ServedKeys()) {
    document[Pointer(key.path)] = WriteKey(key, copy);
  }
  if (optimizer.type.empty()) document["optimizer"] = nullptr;
  if (scheduler.type.empty()) document["scheduler"] = nullptr;
  return document.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

}  // namespace zerod
