// SPDX-License-Identifier: Apache-2.0
//
// The list of what is wrong with a configuration, and how its parts are shown. Private to base/.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace zerod {

using Json = nlohmann::json;

// Collects problems so that the user mends all of them at once. Not thread-safe.
class ConfigProblems {
 public:
  // `path` is dotted ("zero_optimization.stage") or empty for the whole text.
  void Add(absl::string_view path, absl::string_view what);
  bool empty() const { return lines_.empty(); }
  size_t size() const { return lines_.size() + lines_left_out_; }
  // The next is counted, but not shown: no need to find advice for it.
  bool full() const;
  // One problem of several keys.
  void AddFor(const std::vector<std::string>& paths, absl::string_view what);
  // True where `path`, or something within it, has a problem.
  bool Concerns(absl::string_view path) const;
  // OK, or INVALID_ARGUMENT with a line per problem, in the order of Add.
  absl::Status ToStatus() const;

 private:
  std::vector<std::string> paths_;
  std::vector<std::string> lines_;
  size_t lines_left_out_ = 0;
};

// `value` as short printable ASCII, for messages.
std::string Abbreviated(const Json& value);

// "block.key", or "key" at the top. A key that is not plain is quoted and abbreviated.
std::string JoinPath(absl::string_view block, absl::string_view key);

}  // namespace zerod
