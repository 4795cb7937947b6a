// SPDX-License-Identifier: Apache-2.0
#include "base/config_json.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace zerod {
namespace {

constexpr size_t kTextBytesMax = 1 << 20;
constexpr size_t kDepthMax = 32;
constexpr size_t kProblemsMax = 64;
constexpr size_t kValueBytesMax = 60;

struct TooDeep : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Watches the parser's events for what the finished document no longer shows.
class Watcher {
 public:
  explicit Watcher(ConfigProblems* problems) : problems_(problems) {}

  bool operator()(Json::parse_event_t event, const Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        if (open_.size() == kDepthMax) throw TooDeep("nested too deeply");
        open_.emplace_back();
        break;
      case Json::parse_event_t::object_end:
      case Json::parse_event_t::array_end:
        open_.pop_back();
        break;
      case Json::parse_event_t::key:
        SeeKey(parsed.get_ref<const std::string&>());
        break;
      case Json::parse_event_t::value:
        break;
    }
    return true;
  }

 private:
  struct Open {
    std::set<std::string> keys;
    std::string key;  // the latest; empty in an array
  };

  void SeeKey(const std::string& key) {
    Open& object = open_.back();
    object.key = key;
    if (object.keys.insert(key).second) return;
    std::string path;
    for (const Open& open : open_) {
      if (!open.key.empty()) path = JoinPath(path, open.key);
    }
    problems_->Add(path, "is given more than once; keep one");
  }

  ConfigProblems* problems_;
  std::vector<Open> open_;
};

// nlohmann's text without its "[json.exception...] parse error at line 1, column 2: " in front.
std::string SyntaxReason(absl::string_view what) {
  const size_t bracket = what.find("] ");
  if (bracket != absl::string_view::npos) what.remove_prefix(bracket + 2);
  if (absl::StartsWith(what, "parse error at ")) {
    what.remove_prefix(sizeof("parse error") - 1);
  }
  std::string reason;
  for (const char c : what.substr(0, 300)) reason += absl::ascii_isprint(c) ? c : '?';
  return reason;
}

}  // namespace

void ConfigProblems::Add(absl::string_view path, absl::string_view what) {
  if (lines_.size() == kProblemsMax) {
    ++lines_left_out_;
    return;
  }
  paths_.emplace_back(path);
  lines_.push_back(path.empty() ? std::string(what) : absl::StrCat(path, ": ", what));
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

Json ParseStrictJson(absl::string_view text, ConfigProblems* problems) {
  if (text.size() > kTextBytesMax) {
    problems->Add("", absl::StrCat("the configuration has ", text.size(), " bytes; at most ",
                                   kTextBytesMax, " are allowed"));
    return nullptr;
  }
  if (absl::StripAsciiWhitespace(text).empty()) {
    problems->Add("", "the configuration is empty; it must be a JSON object, for example "
                      "{\"train_batch_size\": 8}");
    return nullptr;
  }
  Watcher watcher(problems);
  try {
    return Json::parse(
        text.data(), text.data() + text.size(),
        [&watcher](int, Json::parse_event_t event, Json& parsed) {
          return watcher(event, parsed);
        },
        /*allow_exceptions=*/true, /*ignore_comments=*/true);
  } catch (const TooDeep&) {
    problems->Add("", absl::StrCat("the configuration is nested more than ", kDepthMax,
                                   " levels deep"));
  } catch (const Json::exception& e) {
    problems->Add("", absl::StrCat("the configuration is not valid JSON (comments are fine; "
                                   "trailing commas, unquoted keys, NaN and Infinity are not): ",
                                   SyntaxReason(e.what())));
  }
  return nullptr;
}

std::string Abbreviated(const Json& value) {
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
