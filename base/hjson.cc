// SPDX-License-Identifier: Apache-2.0
#include "base/hjson.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace zerod {
namespace {

constexpr size_t kTextBytesMax = 1 << 20;
constexpr size_t kDepthMax = 32;
constexpr size_t kNumberBytesMax = 400;  // so that looking for one costs little at each comma
constexpr char kPunctuation[] = "{}[],:";

bool IsPunctuation(char c) { return absl::StrContains(kPunctuation, c); }

// JSON's: no hexadecimal, no plus in front, no leading zero; such are strings without quotes.
bool IsNumber(absl::string_view text) {
  if (text.size() > kNumberBytesMax) return false;
  size_t i = 0;
  const auto digits = [&text, &i] {
    const size_t begin = i;
    while (i < text.size() && absl::ascii_isdigit(text[i])) ++i;
    return i - begin;
  };
  if (i < text.size() && text[i] == '-') ++i;
  const bool zero = i < text.size() && text[i] == '0';
  const size_t whole = digits();
  if (whole == 0 || (zero && whole > 1)) return false;
  if (i < text.size() && text[i] == '.') {
    ++i;
    if (digits() == 0) return false;
  }
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    if (i < text.size() && (text[i] == '+' || text[i] == '-')) ++i;
    if (digits() == 0) return false;
  }
  return i == text.size();
}

// An integer where it fits 64 bits, else the nearest double; nothing where that is infinite.
std::optional<Json> ToNumber(absl::string_view text) {
  const char* const begin = text.data();
  const char* const end = begin + text.size();
  if (text.find_first_of(".eE") == absl::string_view::npos) {
    uint64_t natural = 0;
    if (std::from_chars(begin, end, natural).ec == std::errc()) return Json(natural);
    int64_t negative = 0;
    if (std::from_chars(begin, end, negative).ec == std::errc()) return Json(negative);
  }
  double real = 0;
  const std::from_chars_result result = std::from_chars(begin, end, real);
  if (result.ec == std::errc()) return Json(real);
  // Too small is zero; too large has no place.
  const size_t exponent = text.find_first_of("eE");
  const bool tiny = exponent != absl::string_view::npos && text[exponent + 1] == '-';
  if (tiny) return Json(0.0);
  return std::nullopt;
}

// What a word without quotes stands for, or nothing for a string.
std::optional<Json> Literal(absl::string_view word) {
  if (word == "true") return Json(true);
  if (word == "false") return Json(false);
  if (word == "null") return Json(nullptr);
  if (word == "NaN") return Json(std::numeric_limits<double>::quiet_NaN());
  if (word == "Infinity") return Json(std::numeric_limits<double>::infinity());
  if (word == "-Infinity") return Json(-std::numeric_limits<double>::infinity());
  return std::nullopt;
}

void AppendUtf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  const int extra = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr int kLead[] = {0, 0xc0, 0xe0, 0xf0};
  out->push_back(static_cast<char>(kLead[extra] | (code >> (6 * extra))));
  for (int i = extra - 1; i >= 0; --i) {
    out->push_back(static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3f)));
  }
}

// Recursive descent; its depth is bounded. After the first error every method returns at once.
class Parser {
 public:
  Parser(absl::string_view text, ConfigProblems* problems) : text_(text), problems_(problems) {}

  Json Parse() {
    Json root;
    SkipBlank();
    if (Peek() == '{' || Peek() == '[' || !LooksLikeMember()) {
      root = Value();
    } else {
      root = Members(/*braces=*/false);
    }
    SkipBlank();
    if (!failed_ && at_ < text_.size()) Fail("there is something after the configuration's end");
    if (failed_) return nullptr;
    return root;
  }

 private:
  struct Open {
    std::set<std::string> keys;
    std::string key;  // the latest; empty in an array
  };

  int Peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? static_cast<unsigned char>(text_[at_ + ahead]) : -1;
  }
  bool Ahead(absl::string_view what) const { return absl::StartsWith(text_.substr(at_), what); }

  void Fail(absl::string_view what) {
    if (failed_) return;
    failed_ = true;
    std::string line = absl::StrCat("the configuration cannot be read at ", Place(at_), ": ", what);
    if (quoteless_.has_value()) {
      absl::StrAppend(&line, " (text without quotes runs to the end of its line; is that meant at ",
                      Place(*quoteless_), "?)");
    }
    problems_->Add("", line);
  }

  std::string Place(size_t at) const {
    size_t line = 1;
    size_t column = 1;
    for (size_t i = 0; i < at && i < text_.size(); ++i) {
      column = text_[i] == '\n' ? 1 : column + 1;
      line += text_[i] == '\n';
    }
    return absl::StrCat("line ", line, ", column ", column);
  }

  // Skips white space and comments.
  void SkipBlank() {
    while (!failed_ && at_ < text_.size()) {
      if (absl::ascii_isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (Peek() == '#' || Ahead("//")) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (Ahead("/*")) {
        const size_t end = text_.find("*/", at_ + 2);
        if (end == absl::string_view::npos) return Fail("a comment that is not closed");
        at_ = end + 2;
      } else {
        return;
      }
    }
  }

  // Whether "key:" comes, at the root. Leaves the place.
  bool LooksLikeMember() {
    const size_t begin = at_;
    ConfigProblems* const problems = problems_;
    ConfigProblems unseen;
    problems_ = &unseen;
    Key();
    SkipBlank();
    const bool member = !failed_ && Peek() == ':';
    problems_ = problems;
    failed_ = false;
    at_ = begin;
    return member;
  }

  Json Value() {
    SkipBlank();
    if (failed_) return nullptr;
    if (Ahead("'''")) return MultilineString();
    switch (Peek()) {
      case -1: Fail("the text ends where a value should be"); return nullptr;
      case '{': return Object();
      case '[': return Array();
      case '"':
      case '\'': return QuotedString();
      default: return Quoteless();
    }
  }

  bool Enter() {
    if (open_.size() == kDepthMax) {
      Fail(absl::StrCat("it is nested more than ", kDepthMax, " levels deep"));
      return false;
    }
    ++at_;
    return true;
  }

  Json Object() {
    if (!Enter()) return nullptr;
    return Members(/*braces=*/true);
  }

  Json Members(bool braces) {
    Json object = Json::object();
    open_.emplace_back();
    for (;;) {
      SkipBlank();
      if (failed_) return nullptr;
      if (braces && Peek() == '}') {
        ++at_;
        break;
      }
      if (!braces && Peek() == -1) break;
      std::string key = Key();
      SkipBlank();
      if (!failed_ && Peek() != ':') Fail(absl::StrCat("a \":\" is missing after the key"));
      if (failed_) return nullptr;
      ++at_;
      SeeKey(key);
      Json value = Value();
      if (failed_) return nullptr;
      object[std::move(key)] = std::move(value);
      SkipBlank();
      if (Peek() == ',') ++at_;
    }
    open_.pop_back();
    return object;
  }

  Json Array() {
    if (!Enter()) return nullptr;
    Json array = Json::array();
    open_.emplace_back();
    for (;;) {
      SkipBlank();
      if (failed_) return nullptr;
      if (Peek() == ']') {
        ++at_;
        break;
      }
      Json value = Value();
      if (failed_) return nullptr;
      array.push_back(std::move(value));
      SkipBlank();
      if (Peek() == ',') ++at_;
    }
    open_.pop_back();
    return array;
  }

  void SeeKey(const std::string& key) {
    open_.back().key = key;
    if (open_.back().keys.insert(key).second) return;
    std::string path;
    for (const Open& open : open_) {
      if (!open.key.empty()) path = JoinPath(path, open.key);
    }
    problems_->Add(path, "is given more than once; keep one");
  }

  std::string Key() {
    if (Peek() == '"' || Peek() == '\'') return QuotedString();
    const size_t begin = at_;
    while (at_ < text_.size() && !IsPunctuation(text_[at_]) &&
           !absl::ascii_isspace(static_cast<unsigned char>(text_[at_]))) {
      ++at_;
    }
    if (at_ == begin) Fail(Peek() == -1 ? "the text ends within an object" : "a key is missing");
    return std::string(text_.substr(begin, at_ - begin));
  }

  Json Quoteless() {
    if (IsPunctuation(static_cast<char>(Peek()))) {
      Fail("a value is missing");
      return nullptr;
    }
    const size_t begin = at_;
    for (;; ++at_) {
      const int c = Peek();
      const bool line_ends = c == -1 || c == '\n' || c == '\r';
      if (!line_ends && c != ',' && c != '}' && c != ']' && c != '#' && !Ahead("//") &&
          !Ahead("/*")) {
        continue;
      }
      const absl::string_view word =
          absl::StripTrailingAsciiWhitespace(text_.substr(begin, at_ - begin));
      if (std::optional<Json> literal = Literal(word)) return *std::move(literal);
      if (IsNumber(word)) {
        if (std::optional<Json> number = ToNumber(word)) return *std::move(number);
        Fail(absl::StrCat("the number ", word.substr(0, 40), " is too large"));
        return nullptr;
      }
      if (!line_ends) continue;
      if (word.find_first_of(",{}[]") != absl::string_view::npos) quoteless_ = begin;
      return std::string(word);
    }
  }

  std::string QuotedString() {
    const char quote = static_cast<char>(Peek());
    std::string out;
    ++at_;
    for (; !failed_; ++at_) {
      const int c = Peek();
      if (c == quote) {
        ++at_;
        return out;
      }
      if (c == -1) {
        Fail("the text ends within a string");
      } else if (c < 0x20) {
        Fail("a line end or another control character within a string");
      } else if (c == '\\') {
        ++at_;
        Escape(&out);
      } else {
        out.push_back(static_cast<char>(c));
      }
    }
    return out;
  }

  // Leaves the place on the escape's last character.
  void Escape(std::string* out) {
    constexpr char kFrom[] = "\"'\\/bfnrt";
    constexpr char kTo[] = "\"'\\/\b\f\n\r\t";
    const int c = Peek();
    const size_t known = c <= 0 ? absl::string_view::npos
                                : absl::string_view(kFrom).find(static_cast<char>(c));
    if (known != absl::string_view::npos) {
      out->push_back(kTo[known]);
      return;
    }
    const std::optional<uint32_t> first = c == 'u' ? Hex4(at_ + 1) : std::nullopt;
    if (!first.has_value()) return Fail("an escape that JSON does not have");
    uint32_t code = *first;
    at_ += 4;
    if (code >= 0xd800 && code < 0xe000) {
      const bool pair = code < 0xdc00 && Peek(1) == '\\' && Peek(2) == 'u';
      const std::optional<uint32_t> low = pair ? Hex4(at_ + 3) : std::nullopt;
      if (!low.has_value() || *low < 0xdc00 || *low >= 0xe000) {
        return Fail("half of a surrogate pair");
      }
      code = 0x10000 + ((code - 0xd800) << 10) + (*low - 0xdc00);
      at_ += 6;
    }
    AppendUtf8(code, out);
  }

  std::optional<uint32_t> Hex4(size_t at) const {
    uint32_t code = 0;
    if (at + 4 > text_.size()) return std::nullopt;
    const char* const begin = text_.data() + at;
    const std::from_chars_result result = std::from_chars(begin, begin + 4, code, 16);
    if (result.ec != std::errc() || result.ptr != begin + 4) return std::nullopt;
    return code;
  }

  // Without the white space that the opening quotes' column indents each line by, and without the
  // line end before the closing ones.
  std::string MultilineString() {
    const size_t line = text_.rfind('\n', at_);
    const size_t indent = at_ - (line == absl::string_view::npos ? 0 : line + 1);
    const size_t begin = at_ + 3;
    const size_t end = text_.find("'''", begin);
    if (end == absl::string_view::npos) {
      Fail("the text ends within a string of several lines");
      return "";
    }
    at_ = end + 3;
    absl::string_view body = text_.substr(begin, end - begin);
    const size_t first = body.find_first_not_of(" \t\r");
    if (first != absl::string_view::npos && body[first] == '\n') body.remove_prefix(first + 1);
    std::string out;
    bool line_start = true;
    for (size_t i = 0, skipped = 0; i < body.size(); ++i) {
      const char c = body[i];
      if (line_start && skipped < indent && (c == ' ' || c == '\t')) {
        ++skipped;
        continue;
      }
      line_start = c == '\n';
      if (line_start) skipped = 0;
      if (c != '\r') out.push_back(c);
    }
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
  }

  const absl::string_view text_;
  ConfigProblems* problems_;
  size_t at_ = 0;
  bool failed_ = false;
  std::vector<Open> open_;
  std::optional<size_t> quoteless_;  // where text without quotes holds punctuation, the likely slip
};

// Where the text is not UTF-8, or empty.
std::string BadUtf8(absl::string_view text) {
  try {
    (void)Json(std::string(text)).dump();
  } catch (const Json::exception& e) {
    absl::string_view what = e.what();
    const size_t bracket = what.find("] ");
    if (bracket != absl::string_view::npos) what.remove_prefix(bracket + 2);
    return std::string(what);
  }
  return "";
}

}  // namespace

Json ParseHjson(absl::string_view text, ConfigProblems* problems) {
  if (text.size() > kTextBytesMax) {
    problems->Add("", absl::StrCat("the configuration has ", text.size(), " bytes; at most ",
                                   kTextBytesMax, " are allowed"));
    return nullptr;
  }
  absl::ConsumePrefix(&text, "\xef\xbb\xbf");  // a byte order mark
  if (absl::StripAsciiWhitespace(text).empty()) {
    problems->Add("", "the configuration is empty; it must be a JSON object, for example "
                      "{\"train_batch_size\": 8}");
    return nullptr;
  }
  if (const std::string bad = BadUtf8(text); !bad.empty()) {
    problems->Add("", absl::StrCat("the configuration is not UTF-8 text: ", bad));
    return nullptr;
  }
  return Parser(text, problems).Parse();
}

}  // namespace zerod
