// SPDX-License-Identifier: Apache-2.0
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/config_state.h"

namespace zerod {
namespace {

std::pair<std::string, std::string> SplitLast(absl::string_view path) {
  const size_t dot = path.rfind('.');
  if (dot == absl::string_view::npos) return {"", std::string(path)};
  return {std::string(path.substr(0, dot)), std::string(path.substr(dot + 1))};
}

// The object at `path`, made where there is none, or null where something else is in its place.
Json* ObjectAt(Json* document, absl::string_view path) {
  if (path.empty()) return document;
  const auto [block, name] = SplitLast(path);
  Json* const parent = ObjectAt(document, block);
  if (parent == nullptr) return nullptr;
  Json& object = (*parent)[name];
  if (object.is_null()) object = Json::object();
  return object.is_object() ? &object : nullptr;
}

void ApplyAlias(const ConfigAlias& alias, ParseState* state) {
  const auto [block, name] = SplitLast(alias.path);
  if (!ValueAt(state->document, block).is_object()) return;
  Json& holder = *ObjectAt(&state->document, block);
  if (!holder.contains(name)) return;
  Json value = std::move(holder[name]);
  holder.erase(name);
  if (value.is_null()) return;
  const auto [target_block, target_name] = SplitLast(alias.target);
  const std::string rival = alias.on_true == nullptr ? alias.target : target_block;
  if (!ValueAt(state->document, rival).is_null()) {
    state->problems.Add(alias.path,
                        absl::StrCat("is another name for ", rival, ", which is given too; keep ",
                                     alias.deprecated ? "the latter" : "one"));
    return;
  }
  if (alias.on_true != nullptr && !value.is_boolean()) {
    state->problems.Add(alias.path,
                        absl::StrCat(Abbreviated(value), " is not allowed; it must be true or "
                                                         "false, or leave it out"));
    return;
  }
  if (alias.deprecated) {
    state->Warn(alias.path, absl::StrCat("is deprecated; its name is now ", alias.target));
  }
  if (alias.on_true != nullptr) {
    if (!value.get<bool>()) return;
    value = Json::parse(alias.on_true);
  }
  Json* const target = ObjectAt(&state->document, target_block);
  if (target == nullptr) return;  // what is in its place is a problem of its own
  (*target)[target_name] = std::move(value);
  const auto kind = alias.deprecated ? ValueSource::kDeprecated : ValueSource::kFile;
  const std::string within = absl::StrCat(alias.target, ".");
  for (const ConfigKey& key : ConfigKeys()) {  // those of a block
    const absl::string_view path = key.path;
    if (path != alias.target && !absl::StartsWith(path, within)) continue;
    if (ValueAt(state->document, path).is_null()) continue;
    state->SetSource(path, kind, absl::StrCat("as ", alias.path));
  }
}

}  // namespace

void ApplyAliases(ParseState* state) {
  // Before there were stages, ZeRO was on or off.
  Json& document = state->document;
  if (document.contains("zero_optimization") && document["zero_optimization"].is_boolean()) {
    const bool on = document["zero_optimization"].get<bool>();
    state->Warn("zero_optimization",
                absl::StrCat(on ? "true" : "false", " is deprecated; write {\"stage\": ",
                             on ? 1 : 0, "}"));
    document["zero_optimization"] = Json::object({{"stage", on ? 1 : 0}});
    state->SetSource("zero_optimization.stage", ValueSource::kDeprecated, "as zero_optimization");
  }
  for (const ConfigAlias& alias : ConfigAliases()) ApplyAlias(alias, state);
}

}  // namespace zerod
