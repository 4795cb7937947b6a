// SPDX-License-Identifier: Apache-2.0
//
// What people read of a configuration and of its keys.
#include <algorithm>
#include <string>
#include <variant>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/config_keys.h"
#include "base/config_parse.h"
#include "base/config_state.h"

namespace zerod {
namespace {

std::string SourceText(const ValueSource& source) {
  const char* const kinds[] = {"default", "file", "file, deprecated", "auto", "derived"};
  const std::string kind = kinds[source.kind];
  return source.detail.empty() ? kind : absl::StrCat(kind, ": ", source.detail);
}

// Why the value does nothing, or empty.
std::string NoEffect(const ConfigKey& key, const ParsedConfig& parsed) {
  if (key.served == Served::kNoMeaning) return absl::StrCat("no meaning here: ", key.note);
  if (IsGatedOff(key, parsed.config)) return absl::StrCat("no effect without ", key.gate->text);
  return "";
}

const char* ServedText(Served served) {
  switch (served) {
    case Served::kWorks: return "works";
    case Served::kWorksBetter: return "works better";
    case Served::kNoMeaning: return "no meaning";
    case Served::kNotYet: return "not yet";
    case Served::kNever: return "never";
  }
  return "";
}

std::string Code(absl::string_view text) { return absl::StrCat("`", text, "`"); }

std::string NumberText(double v) {
  return v == static_cast<double>(static_cast<int64_t>(v)) ? absl::StrCat(static_cast<int64_t>(v))
                                                           : Json(v).dump();
}

bool IsRates(const ConfigKey& key) {
  Config config;
  const Slot slot = key.slot(config);
  return std::holds_alternative<Rates*>(slot) ||
         std::holds_alternative<std::optional<Rates>*>(slot);
}

// What the key may be; the type comes from the default's.
std::string AllowedText(const ConfigKey& key) {
  if (key.slot == nullptr) return "off";
  if (key.form == TextForm::kText || key.form == TextForm::kJob) return "string";
  if (!key.choices.empty()) {
    return absl::StrJoin(key.choices, ", ", [](std::string* out, const std::string& word) {
      absl::StrAppend(out, Code(word));
    });
  }
  const Json& value = DefaultOf(key);
  if (value.is_boolean()) return "bool";
  if (key.max == 0) return value.is_array() ? "list" : value.is_object() ? "list, object" : "bool";
  if (IsRates(key)) {
    return absl::StrCat("from ", NumberText(key.min), key.max_excluded ? " to below " : "",
                        key.max_excluded ? NumberText(key.max) : "", "; or a list, by group");
  }
  const char* const pair = value.is_array() ? "two, " : "";
  if (key.max >= kRealMax) {
    return key.min <= -kRealMax ? "number" : absl::StrCat(pair, "from ", NumberText(key.min));
  }
  if (key.max >= kCountMax) return absl::StrCat("from ", NumberText(key.min));
  return absl::StrCat(pair, NumberText(key.min), " to ",
                      key.max_excluded ? "below " : "", NumberText(key.max));
}

std::string DefaultText(const ConfigKey& key) {
  if (key.slot == nullptr) return "";
  const absl::string_view path = key.path;
  if (path == "train_batch_size" || path == "train_micro_batch_size_per_gpu" ||
      path == "gradient_accumulation_steps" || path == "optimizer.type" ||
      path == "scheduler.type") {
    return "";  // nothing stands for what is left out
  }
  if (path == "zero_optimization.leaf_module.classes") return "three of transformers'";
  return Code(DefaultOf(key).dump());
}

std::string NoteText(const ConfigKey& key) {
  std::string note = key.note;
  const auto add = [&note](const std::string& more) {
    absl::StrAppend(&note, note.empty() ? "" : ". ", more);
  };
  if (key.also != nullptr) add(absl::StrCat(Code(key.also), " is accepted too"));
  if (key.size != nullptr) add(absl::StrCat(Code(key.size), " 0 or 1 is off"));
  if (key.gate != nullptr) add(absl::StrCat("Without ", key.gate->text, " it has no effect"));
  if (!key.types.empty()) add(absl::StrCat("Of ", absl::StrJoin(key.types, ", ")));
  if (!key.later.empty()) add(absl::StrCat("Not yet: ", absl::StrJoin(key.later, ", ")));
  return absl::StrReplaceAll(note, {{"|", "\\|"}});
}

}  // namespace

std::string DescribeConfig(const ParsedConfig& parsed) {
  std::string text;
  Config config = parsed.config;
  for (const std::string& warning : parsed.warnings) {
    absl::StrAppend(&text, "warning: ", warning, "\n");
  }
  const auto add = [&parsed, &text](absl::string_view path, size_t width, const Json& value,
                                    const std::string& no_effect) {
    const ValueSource& source = parsed.sources.at(std::string(path));
    absl::StrAppend(&text, path, std::string(width - path.size(), ' '), " = ", Abbreviated(value),
                    "  (", SourceText(source),
                    no_effect.empty() || source.kind == ValueSource::kDefault
                        ? ""
                        : absl::StrCat("; ", no_effect),
                    ")\n");
  };
  size_t width = 0;
  for (const auto& [path, source] : parsed.sources) width = std::max(width, path.size());
  for (const ConfigKey& key : ConfigKeys()) {
    if (parsed.sources.count(key.path) == 0) continue;
    add(key.path, width, WriteKey(key, config), NoEffect(key, parsed));
  }
  for (const auto& [name, value] : config.scheduler.torch_params) {
    add(JoinPath("scheduler.params", name), width, Json::parse(value), "");
  }
  return text;
}

std::string DescribeConfigAsJson(const ParsedConfig& parsed) {
  Json document = {{"config", Json::parse(parsed.config.ToJson())},
                   {"sources", Json::object()},
                   {"warnings", parsed.warnings},
                   {"auto", parsed.auto_keys}};
  for (const auto& [path, source] : parsed.sources) {
    document["sources"][path] = SourceText(source);
  }
  return document.dump(2, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace) + "\n";
}

std::string ConfigKeysAsMarkdown() {
  std::string text = "| key | served | default | allowed | |\n|---|---|---|---|---|\n";
  for (const ConfigKey& key : ConfigKeys()) {
    absl::StrAppend(&text, "| `", key.path, "` | ", ServedText(key.served), " | ",
                    DefaultText(key), " | ", AllowedText(key), " | ", NoteText(key), " |\n");
  }
  absl::StrAppend(&text, "\n| other name | key | |\n|---|---|---|\n");
  for (const ConfigAlias& alias : ConfigAliases()) {
    absl::StrAppend(&text, "| `", alias.path, "` | `", alias.target, "` | ",
                    alias.deprecated ? "deprecated: a warning" : "", " |\n");
  }
  return text;
}

}  // namespace zerod
