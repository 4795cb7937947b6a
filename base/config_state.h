// SPDX-License-Identifier: Apache-2.0
//
// A configuration while it is read: the steps of ParseConfig, in their order. Each adds problems
// and goes on, so that the user sees all of them at once. Private to base/.
#pragma once

#include <set>
#include <string>

#include "base/config_json.h"
#include "base/config_keys.h"
#include "base/config_parse.h"

namespace zerod {

struct ParseState {
  explicit ParseState(const ParseOptions& parse_options) : options(parse_options) {}

  void Warn(absl::string_view path, absl::string_view what);
  void SetSource(absl::string_view path, ValueSource::Kind kind, std::string detail = "");
  bool Given(absl::string_view path) const { return given.count(std::string(path)) > 0; }

  const ParseOptions& options;
  Json document;  // an object
  ParsedConfig parsed;
  ConfigProblems problems;
  std::set<std::string> given;  // paths of keys with a value, "auto" resolved or not
};

// Puts values under older or shorter names where they belong. (config_alias.cc)
void ApplyAliases(ParseState* state);
// Puts values in place of "auto"; one problem names the keys that have none. (config_auto.cc)
void ResolveAuto(ParseState* state);
// Checks and completes what depends on several keys. (config_rules.cc)
void CheckRules(ParseState* state);
// Refuses what would have no effect. (config_rules.cc)
void CheckServed(ParseState* state);

// Of a dotted path.
Json::json_pointer Pointer(absl::string_view path);
// The value at `path`, or null where there is none.
const Json& ValueAt(const Json& document, absl::string_view path);

}  // namespace zerod
