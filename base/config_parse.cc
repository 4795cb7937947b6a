// SPDX-License-Identifier: Apache-2.0
#include "base/config_parse.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/config_state.h"
#include "base/hjson.h"

namespace zerod {
namespace {

constexpr size_t kWarningsMax = 64;
constexpr char kSchedulerParams[] = "scheduler.params";

// A key that has no slot: it can be switched off, or left out.
void ReadSwitch(const ConfigKey& key, const Json& value, ParseState* state) {
  if (value.is_null() || IsIdentity(key, value)) return;
  const bool off = IsOff(value) || HasSizeOfOne(key, value);
  const char* const state_text = key.served == Served::kNotYet ? "not served yet" : "not served";
  if (off) {
    state->Warn(key.path, absl::StrCat("is ", state_text, " and is off here; leave it out"));
  } else {
    state->problems.Add(key.path,
                        absl::StrCat("is ", state_text, ": ", key.note, "; leave it out"));
  }
}

// Advice costs a comparison with every key, so there is none once nobody would see it.
void RefuseUnknown(const std::string& block, const std::string& name, bool error,
                   ParseState* state) {
  const bool shown = error ? !state->problems.full() : state->parsed.warnings.size() < kWarningsMax;
  const std::string advice = shown ? AdviceForUnknownKey(block, name) : "";
  const std::string path = JoinPath(block, name);
  if (error) {
    state->problems.Add(path, advice);
  } else {
    state->Warn(path, absl::StrCat(advice, " It has no effect"));
  }
}

// Whether numbers are all that a file can write and read back.
bool IsFinite(const Json& value) {
  if (value.is_number_float()) return std::isfinite(value.get<double>());
  return !value.is_structured() || std::all_of(value.begin(), value.end(), IsFinite);
}

// Whether "scheduler" has a type that the table's parameters are not for. One that there is not is
// refused by itself, so its parameters need not be.
bool HasOtherScheduler(const ParseState& state) {
  const Json& type = ValueAt(state.document, "scheduler.type");
  return type.is_string() && !Contains(DeepSpeedSchedulers(), type.get_ref<const std::string&>());
}

// Reads the arguments of one of PyTorch's schedulers, whatever they are.
void ReadTorchParams(const Json& object, ParseState* state) {
  for (const auto& [name, value] : object.items()) {
    if (value.is_null()) continue;
    const std::string path = JoinPath(kSchedulerParams, name);
    if (!IsIdentifier(name)) {
      state->problems.Add(path, "is not a name that an argument can have");
    } else if (!IsFinite(value)) {
      state->problems.Add(path, Abbreviated(value) + " is not allowed; numbers must be finite");
    } else {
      state->parsed.config.scheduler.torch_params[name] = value.dump(
          -1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
      if (state->parsed.sources[path].kind == ValueSource::kDefault) {
        state->SetSource(path, ValueSource::kFile);
      }
    }
  }
}

// Reads the keys of one block and of the blocks within; how deep is bounded by the table.
void ReadBlock(const Json& object, const std::string& block, bool strict, ParseState* state) {
  for (const auto& [name, value] : object.items()) {
    const std::string path = JoinPath(block, name);
    const ConfigKey* const key = FindConfigKey(path);
    if (key != nullptr && key->slot == nullptr) {
      ReadSwitch(*key, value, state);
    } else if (key != nullptr) {
      if (value.is_null()) continue;
      state->given.insert(path);
      if (state->parsed.sources[path].kind == ValueSource::kDefault) {
        state->SetSource(path, ValueSource::kFile);
      }
      ReadKey(*key, value, &state->parsed.config, &state->problems);
    } else if (IsConfigBlock(path)) {
      if (value.is_object() && path == kSchedulerParams && HasOtherScheduler(*state)) {
        ReadTorchParams(value, state);
      } else if (value.is_object()) {
        ReadBlock(value, path, strict, state);
      } else if (!value.is_null()) {
        state->problems.Add(path, Abbreviated(value) + " is not allowed; it must be an object");
      }
    } else {
      RefuseUnknown(block, name, strict || !block.empty(), state);
    }
  }
}

// Whether unknown keys at the top are errors.
bool IsStrict(const ParseState& state) {
  const Json& strict = ValueAt(state.document, "zerod.strict");
  if (strict.is_boolean()) return strict.get<bool>();
  return !state.options.unknown_top_keys_are_warnings;
}

// Every key that ToJson writes has a source, and no other.
void CompleteSources(ParsedConfig* parsed) {
  std::map<std::string, ValueSource> sources;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.slot == nullptr || !IsOfType(key, parsed->config)) continue;
    sources[key.path] = std::move(parsed->sources[key.path]);
  }
  for (const auto& [name, value] : parsed->config.scheduler.torch_params) {
    const std::string path = JoinPath(kSchedulerParams, name);
    sources[path] = std::move(parsed->sources[path]);
  }
  parsed->sources = std::move(sources);
}

}  // namespace

void ParseState::Warn(absl::string_view path, absl::string_view what) {
  if (parsed.warnings.size() == kWarningsMax) return;
  parsed.warnings.push_back(absl::StrCat(path, ": ", what));
}

void ParseState::SetSource(absl::string_view path, ValueSource::Kind kind, std::string detail) {
  parsed.sources[std::string(path)] = ValueSource{kind, std::move(detail)};
}

Json::json_pointer Pointer(absl::string_view path) {
  if (path.empty()) return Json::json_pointer();
  return Json::json_pointer(absl::StrCat("/", absl::StrReplaceAll(path, {{".", "/"}})));
}

const Json& ValueAt(const Json& document, absl::string_view path) {
  static const Json& nothing = *new Json(nullptr);  // tidy: allow (never destroyed)
  const Json::json_pointer pointer = Pointer(path);
  return document.contains(pointer) ? document.at(pointer) : nothing;
}

absl::StatusOr<ParsedConfig> ParseConfig(absl::string_view text, const ParseOptions& options) {
  ParseState state(options);
  state.document = ParseHjson(text, &state.problems);
  if (!state.problems.empty() && state.document.is_null()) return state.problems.ToStatus();
  if (!state.document.is_object()) {
    state.problems.Add("", absl::StrCat("the configuration is ", Abbreviated(state.document),
                                        "; it must be a JSON object"));
    return state.problems.ToStatus();
  }
  ApplyAliases(&state);
  ResolveAuto(&state);
  ReadBlock(state.document, "", IsStrict(state), &state);
  CheckRules(&state);
  CheckServed(&state);
  if (!state.problems.empty()) return state.problems.ToStatus();
  CompleteSources(&state.parsed);
  return std::move(state.parsed);
}

}  // namespace zerod
