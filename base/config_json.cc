// SPDX-License-Identifier: Apache-2.0
#include "base/config_json.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace zerod {
namespace {

constexpr size_t kProblemsMax = 64;
constexpr size_t kValueBytesMax = 60;

}  // namespace

bool ConfigProblems::full() const { return lines_.size() == kProblemsMax; }

void ConfigProblems::Add(absl::string_view path, absl::string_view what) {
  if (full()) {
    ++lines_left_out_;
    return;
  }
  paths_.emplace_back(path);
  lines_.push_back(path.empty() ? std::string(what) : absl::StrCat(path, ": ", what));
}

void ConfigProblems::AddFor(const std::vector<std::string>& paths, absl::string_view what) {
  Add("", what);
  paths_.insert(paths_.end(), paths.begin(), paths.end());
}

bool ConfigProblems::Concerns(absl::string_view path) const {
  return std::any_of(paths_.begin(), paths_.end(), [path](const std::string& problem) {
    return problem == path || absl::StartsWith(problem, absl::StrCat(path, "."));
  });
}

absl::Status ConfigProblems::ToStatus() const {
  if (lines_.empty()) return absl::OkStatus();
  std::string text = absl::StrJoin(lines_, "\n");
  if (lines_left_out_ > 0) {
    absl::StrAppend(&text, "\nand ", lines_left_out_, " more; mend these first");
  }
  return absl::InvalidArgumentError(text);
}

std::string Abbreviated(const Json& value) {
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    const double v = value.get<double>();
    return std::isnan(v) ? "NaN" : v > 0 ? "Infinity" : "-Infinity";
  }
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  if (text.size() > kValueBytesMax) {
    text.resize(kValueBytesMax - 3);
    text += "...";
  }
  return text;
}

std::string JoinPath(absl::string_view block, absl::string_view key) {
  const bool plain = !key.empty() && key.size() <= kValueBytesMax &&
                     std::all_of(key.begin(), key.end(), [](char c) {
                       return absl::ascii_isalnum(c) || c == '_' || c == '-';
                     });
  std::string shown = plain ? std::string(key) : Abbreviated(Json(std::string(key)));
  return block.empty() ? shown : absl::StrCat(block, ".", shown);
}

}  // namespace zerod
