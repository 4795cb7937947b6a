// SPDX-License-Identifier: Apache-2.0
//
// The table of the configuration's keys: what is served and where it goes, and what of DeepSpeed's
// is known but not served. Private to base/.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/config.h"
#include "base/config_json.h"

namespace zerod {

using Betas = std::pair<double*, double*>;
using Units = std::map<std::string, std::string>;
// Where a value goes; the type says how it is read.
using Slot = std::variant<uint64_t*, uint32_t*, double*, bool*, std::string*, GradientPlanChoice*,
                          Betas, Units*>;

struct ServedKey {
  const char* path;  // dotted
  Slot (*slot)(Config&);
  // Numbers: the range, both ends included unless max_excluded.
  double min = 0;
  double max = 0;
  bool max_excluded = false;
  // Strings: what they may be, in the order of the enum where there is one; empty: a job's id.
  std::vector<std::string> choices = {};
};

const std::vector<ServedKey>& ServedKeys();
const ServedKey* FindServedKey(absl::string_view path);
// True for what holds served keys: "optimizer", "optimizer.params".
bool IsServedBlock(absl::string_view path);

// Writes `value`, which is not null, to the key's slot, or adds a problem and leaves the slot.
void ReadKey(const ServedKey& key, const Json& value, Config* config, ConfigProblems* problems);
// The key's value as JSON; `config` is only read.
Json WriteKey(const ServedKey& key, Config& config);

// Adds the problem that `key` of `block` (empty: the top) is not a served one, with advice.
void RefuseKey(absl::string_view block, const std::string& key, ConfigProblems* problems);

// The problem with the value "auto" where there is nothing to choose by itself.
inline constexpr char kAutoIsLater[] =
    "\"auto\" is resolved by the integrations (Accelerate, Transformers), which come later; "
    "write the value";

}  // namespace zerod
