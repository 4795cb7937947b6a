// SPDX-License-Identifier: Apache-2.0
//
// The table of the configuration's keys: where each goes, what it may be, whether it is served and
// why not. Parser, messages and docs/config.md come from it alone. Private to base/.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/config.h"
#include "base/config_json.h"

namespace zerod {

using Betas = std::pair<double*, double*>;
using Units = std::map<std::string, std::string>;
using Words = std::vector<std::string>;
// Where a value goes; the type says how it is read. nullopt is JSON's null, that of a list "auto".
using Slot = std::variant<uint64_t*, uint32_t*, int64_t*, double*, bool*, std::string*, Words*,
                          std::optional<uint64_t>*, std::optional<double>*, std::optional<bool>*,
                          std::optional<std::string>*, std::optional<Words>*, GradientPlanChoice*,
                          Betas, Units*, Rates*, std::optional<Rates>*>;

// From the best to the worst.
enum class Served {
  kWorks,
  kWorksBetter,  // works, and the note says what is better
  kNoMeaning,    // accepted with any value; the note says why it has none in this design
  kNotYet,       // must have its default
  kNever,        // must have its default, or where there is no slot be switched off
};

// What a key depends on: where `on` is false its value is checked and has no effect.
struct Gate {
  const char* text;  // "fp16.enabled with fp16.loss_scale 0"
  Words switches;    // the keys that open it; where one is refused, that is enough
  bool (*on)(const Config&);
};

enum class TextForm { kChoice, kText, kJob };

struct ConfigKey {
  const char* path;  // dotted
  Served served = Served::kWorks;
  const char* note = "";  // a sentence's part: what it does, or why it has no effect
  // Null: a block, or a value, of which only "switched off" can be accepted.
  Slot (*slot)(Config&) = nullptr;
  // Numbers: the range, both ends included unless excluded.
  double min = 0;
  double max = 0;
  bool max_excluded = false;
  bool or_never = false;  // Infinity is the same as null
  TextForm form = TextForm::kChoice;
  Words choices = {};  // of kChoice: what is served, in the order of the enum where there is one
  Words later = {};    // of kChoice: known, but not served yet
  // Of kChoice: known and refused, each with why and what to do instead.
  std::vector<std::pair<std::string, std::string>> refused = {};
  bool any_case = false;
  bool torch_name = false;  // "torch.bfloat16", which is str(torch.bfloat16), is "bfloat16"
  const Gate* gate = nullptr;
  Words types = {};   // of the optimizer or scheduler that has this parameter; empty: every one
  const char* also = nullptr;  // JSON text of a value besides the default that is served
  const char* size = nullptr;  // without a slot: the block's member by which 0 and 1 switch it off
};

// An older or shorter name of a key.
struct ConfigAlias {
  const char* path;
  const char* target;   // the key's path, or a block's
  bool deprecated;      // so a warning; else simply another name
  const char* on_true;  // JSON text that true stands for, and false for nothing; null: the value
};

const std::vector<ConfigKey>& ConfigKeys();
const std::vector<ConfigAlias>& ConfigAliases();
// The parts of the table, in its order. Each ends in the next file's.
void AppendTopKeys(std::vector<ConfigKey>* keys);        // config_table.cc
void AppendZeroKeys(std::vector<ConfigKey>* keys);       // config_table_zero.cc
void AppendOptimizerKeys(std::vector<ConfigKey>* keys);  // config_table_optimizer.cc
void AppendOtherKeys(std::vector<ConfigKey>* keys);      // config_table_other.cc

// What whole numbers and reals may be.
inline constexpr double kCountMax = 9007199254740992.0;  // 2^53: exact in a double
inline constexpr double kRealMax = 1.7976931348623157e308;

// Classes of torch.optim.lr_scheduler that need nothing but numbers and words. Their parameters
// are not in the table.
const Words& TorchSchedulers();  // config_table_optimizer.cc
// The same with DeepSpeed's own: whose parameters are.
const Words& DeepSpeedSchedulers();
// Letters, digits and underscores, no digit first: what can name an argument.
bool IsIdentifier(absl::string_view name);

const ConfigKey* FindConfigKey(absl::string_view path);
// True for what holds keys: "optimizer", "optimizer.params".
bool IsConfigBlock(absl::string_view path);

// Writes `value`, which is not null, to the key's slot, or adds a problem and leaves the slot. A
// choice that is not served yet is a problem and written.
void ReadKey(const ConfigKey& key, const Json& value, Config* config, ConfigProblems* problems);
// The key's value as JSON; `config` is only read. REQUIRES: a slot.
Json WriteKey(const ConfigKey& key, Config& config);
const Json& DefaultOf(const ConfigKey& key);

// Whether `key` is one of the configuration's optimizer's or scheduler's parameters, or of neither.
bool IsOfType(const ConfigKey& key, const Config& config);
// Whether a value has no effect because its gate is off.
bool IsGatedOff(const ConfigKey& key, const Config& config);
// Whether a value of a key without a slot switches it off: null, false, zero, nothing in it, or
// {"enabled": false, ...}.
bool IsOff(const Json& value);
// Whether `value` is a block in which the member `key.size` is 0 or 1, whatever else is there.
bool HasSizeOfOne(const ConfigKey& key, const Json& value);
// Whether a value of a key without a slot is one that asks for what happens anyway: a group of one.
bool IsIdentity(const ConfigKey& key, const Json& value);

// What is wrong with the unknown key `key` of `block` (empty: the top), with advice.
std::string AdviceForUnknownKey(absl::string_view block, const std::string& key);

std::string Quoted(const std::string& word);
std::string AnyOf(const Words& words);
bool Contains(const Words& words, absl::string_view word);

}  // namespace zerod
