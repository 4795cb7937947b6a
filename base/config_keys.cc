// SPDX-License-Identifier: Apache-2.0
#include "base/config_keys.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"

namespace zerod {
namespace {

constexpr size_t kNameBytesMax = 1024;
constexpr size_t kJobBytesMax = 128;
constexpr size_t kIdentifierBytesMax = 60;
constexpr size_t kRatesMax = 64;  // kGroupsMax of proto/shm/format.h

// The names directly within `block`, blocks included, in the table's order.
Words NamesWithin(absl::string_view block) {
  Words names;
  for (const ConfigKey& key : ConfigKeys()) {
    absl::string_view path = key.path;
    if (!block.empty()) {
      if (!absl::StartsWith(path, absl::StrCat(block, "."))) continue;
      path.remove_prefix(block.size() + 1);
    }
    std::string name(path.substr(0, path.find('.')));
    if (!Contains(names, name)) names.push_back(std::move(name));
  }
  return names;
}

// The keys of this name in other blocks.
Words KeysElsewhere(absl::string_view name) {
  Words paths;
  for (const ConfigKey& key : ConfigKeys()) {
    const absl::string_view path = key.path;
    if (path == name || absl::EndsWith(path, absl::StrCat(".", name))) {
      paths.emplace_back(path);
    }
  }
  return paths;
}

// `{"a": {"b": ...}}` for the path "a.b" within `block` that is nearest to `key`, or empty.
std::string NestedNearest(absl::string_view block, absl::string_view key) {
  Words paths;
  for (const ConfigKey& each : ConfigKeys()) {
    absl::string_view path = each.path;
    if (!block.empty() && !absl::ConsumePrefix(&path, absl::StrCat(block, "."))) continue;
    if (absl::StrContains(path, '.') && each.served <= Served::kNoMeaning) paths.emplace_back(path);
  }
  const std::string nearest = NearestWord(key, paths);
  if (nearest.empty()) return "";
  const Words names = absl::StrSplit(nearest, '.');
  std::string nested = "...";
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    nested = absl::StrCat("{\"", *name, "\": ", nested, "}");
  }
  return nested;
}

// Whether `path`, a key or a block, has something that is served as far as `worst`.
bool HasServed(absl::string_view path, Served worst) {
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.served > worst) continue;
    if (path == key.path || absl::StartsWith(key.path, absl::StrCat(path, "."))) return true;
  }
  return false;
}

// Reads one value into the slot of one key.
class Reader {
 public:
  Reader(const ConfigKey& key, const Json& value, ConfigProblems* problems)
      : key_(key), value_(value), problems_(problems) {}

  void operator()(uint64_t* out) const { ReadWhole(out); }
  void operator()(uint32_t* out) const { ReadWhole(out); }
  void operator()(int64_t* out) const { ReadWhole(out); }

  void operator()(std::optional<uint64_t>* out) const {
    if (key_.or_never && value_.is_number_float() && std::isinf(value_.get<double>())) {
      *out = std::nullopt;  // "every Infinity steps": never
    } else {
      ReadOptional(out);
    }
  }
  void operator()(std::optional<double>* out) const { ReadOptional(out); }
  void operator()(std::optional<bool>* out) const { ReadOptional(out); }
  void operator()(std::optional<std::string>* out) const { ReadOptional(out); }
  void operator()(std::optional<Rates>* out) const { ReadOptional(out); }

  void operator()(double* out) const {
    if (!ReadReal(value_, out)) RefuseNumber("a number");
  }

  void operator()(Rates* out) const {
    static constexpr char kOrList[] = ", or a list of such, one for each parameter group";
    Rates rates;
    if (!value_.is_array()) {
      if (!ReadReal(value_, &rates.values[0])) return RefuseNumber("a number", kOrList);
    } else {
      if (value_.empty() || value_.size() > kRatesMax) return RefuseNumber("a number", kOrList);
      rates.per_group = true;
      rates.values.resize(value_.size());
      for (size_t i = 0; i < value_.size(); ++i) {
        if (!ReadReal(value_[i], &rates.values[i])) return RefuseNumber("a number", kOrList);
      }
    }
    *out = std::move(rates);
  }

  void operator()(bool* out) const {
    if (value_.is_boolean()) {
      *out = value_.get<bool>();
    } else if (value_ == 0 || value_ == 1) {
      *out = value_ == 1;
    } else {
      Refuse("true or false");
    }
  }

  void operator()(std::string* out) const {
    if (key_.form == TextForm::kJob) return ReadJob(out);
    if (key_.form == TextForm::kText) return ReadText(out);
    const size_t choice = Choice();
    if (choice < key_.choices.size()) {
      *out = key_.choices[choice];
    } else if (choice < key_.choices.size() + key_.later.size()) {
      *out = key_.later[choice - key_.choices.size()];
    }
  }

  void operator()(Words* out) const {
    const Json list = value_.is_string() ? Json::array({value_}) : value_;
    Words words;
    if (!list.is_array()) return RefuseWords(value_);
    for (const Json& word : list) {
      if (!IsName(word)) return RefuseWords(word);
      words.push_back(word.get<std::string>());
    }
    *out = std::move(words);
  }

  void operator()(std::optional<Words>* out) const {
    if (value_ == "auto") {
      *out = std::nullopt;
      return;
    }
    Words words;
    const size_t before = problems_->size();
    (*this)(&words);
    if (problems_->size() == before) *out = std::move(words);
  }

  void operator()(GradientPlanChoice* out) const {
    const size_t choice = Choice();
    if (choice < key_.choices.size()) *out = static_cast<GradientPlanChoice>(choice);
  }

  void operator()(Betas out) const {
    double beta1 = 0;
    double beta2 = 0;
    if (value_.is_array() && value_.size() == 2 && ReadReal(value_[0], &beta1) &&
        ReadReal(value_[1], &beta2)) {
      *out.first = beta1;
      *out.second = beta2;
    } else {
      Refuse(key_.max_excluded
                 ? "two numbers of at least 0 and less than 1, for example [0.9, 0.999]"
                 : "two numbers of at least 0");
    }
  }

  void operator()(Units* out) const {
    Units units;
    if (value_.is_array()) {
      for (const Json& module : value_) {
        if (!IsName(module)) return RefuseUnits(module);
        const std::string path = module.get<std::string>();
        if (!units.emplace(path, path).second) {
          return problems_->Add(key_.path, Abbreviated(module) + " is listed twice; keep one");
        }
      }
    } else if (value_.is_object()) {
      for (const auto& [path, name] : value_.items()) {
        if (!IsName(Json(path))) return RefuseUnits(Json(path));
        if (!IsName(name)) return RefuseUnits(name);
        units.emplace(path, name.get<std::string>());
      }
    } else {
      return RefuseUnits(value_);
    }
    *out = std::move(units);
  }

 private:
  template <class T>
  void ReadOptional(std::optional<T>* out) const {
    T value = {};
    const size_t before = problems_->size();
    (*this)(&value);
    if (problems_->size() == before) *out = std::move(value);
  }

  void Refuse(absl::string_view allowed) const {
    problems_->Add(key_.path, absl::StrCat(Abbreviated(value_), " is not allowed; it must be ",
                                           allowed));
  }

  void RefuseWords(const Json& part) const {
    problems_->Add(key_.path, absl::StrCat(Abbreviated(part),
                                           " is not allowed; it must be a list of strings of 1 to ",
                                           kNameBytesMax, " bytes without control characters"));
  }

  void RefuseUnits(const Json& part) const {
    problems_->Add(key_.path,
                   absl::StrCat(Abbreviated(part),
                                " is not allowed; it must be a list of module paths, or an object "
                                "of module paths and unit names, each a string of 1 to ",
                                kNameBytesMax, " bytes without control characters"));
  }

  // `noun` is "a number" or "a whole number"; `more` is what else is allowed.
  void RefuseNumber(absl::string_view noun, absl::string_view more = "") const {
    const auto text = [](double v) { return Json(v).dump(); };
    const auto whole = [](double v) {
      return v < 0 ? absl::StrCat(static_cast<int64_t>(v)) : absl::StrCat(static_cast<uint64_t>(v));
    };
    const bool is_whole = noun != "a number";
    const bool has_max = key_.max < kRealMax;
    if (key_.min == -kRealMax) return Refuse(absl::StrCat(noun, more));
    std::string allowed = absl::StrCat(noun, has_max ? " from " : " of at least ",
                                       is_whole ? whole(key_.min) : text(key_.min));
    if (has_max) {
      absl::StrAppend(&allowed, key_.max_excluded ? " to less than " : " to ",
                      is_whole ? whole(key_.max) : text(key_.max));
    }
    Refuse(absl::StrCat(allowed, more));
  }

  bool InRange(double v) const {
    return std::isfinite(v) && v >= key_.min && (key_.max_excluded ? v < key_.max : v <= key_.max);
  }

  bool ReadReal(const Json& value, double* out) const {
    if (!value.is_number()) return false;
    const double v = value.get<double>();
    if (!InRange(v)) return false;
    *out = v + 0.0;  // makes 0 of -0: equal configurations have equal texts
    return true;
  }

  template <class T>
  void ReadWhole(T* out) const {
    // No limit but the largest integer is above 2^53, so a double decides exactly what is within.
    if (value_.is_number()) {
      const double v = value_.get<double>();
      if (InRange(v) && std::trunc(v) == v) {
        *out = value_.is_number_float() ? static_cast<T>(v) : value_.get<T>();
        return;
      }
    }
    RefuseNumber("a whole number");
  }

  // The index in key_.choices followed by key_.later, or their number; a problem but for a choice.
  size_t Choice() const {
    const size_t served = key_.choices.size();
    Words all = key_.choices;
    all.insert(all.end(), key_.later.begin(), key_.later.end());
    if (value_.is_string()) {
      absl::string_view word = value_.get_ref<const std::string&>();
      if (key_.torch_name) absl::ConsumePrefix(&word, "torch.");
      for (size_t i = 0; i < all.size(); ++i) {
        if (word != all[i] && !(key_.any_case && absl::EqualsIgnoreCase(word, all[i]))) continue;
        if (i >= served) {
          problems_->Add(key_.path, absl::StrCat(Quoted(all[i]), " is not served yet; it must be ",
                                                 AnyOf(key_.choices)));
        }
        return i;
      }
      for (const auto& [name, why] : key_.refused) {
        if (word != name) continue;
        problems_->Add(key_.path, absl::StrCat(Quoted(name), " is not served: ", why));
        return all.size();
      }
      if (const std::string nearest = NearestWord(word, all); !nearest.empty()) {
        Refuse(absl::StrCat(AnyOf(key_.choices), "; did you mean ", Quoted(nearest), "?"));
        return all.size();
      }
    }
    Refuse(AnyOf(key_.choices));
    return all.size();
  }

  void ReadText(std::string* out) const {
    const bool empty = value_.is_string() && value_.get_ref<const std::string&>().empty();
    if (!empty && !IsName(value_)) {
      return Refuse(absl::StrCat("a string of at most ", kNameBytesMax,
                                 " bytes without control characters"));
    }
    *out = value_.get<std::string>();
  }

  void ReadJob(std::string* out) const {
    if (value_.is_string()) {
      const auto& job = value_.get_ref<const std::string&>();
      const bool plain = std::all_of(job.begin(), job.end(), [](char c) {
        return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
      });
      if (plain && job.size() <= kJobBytesMax) {
        *out = job;
        return;
      }
    }
    Refuse(absl::StrCat("a string of at most ", kJobBytesMax,
                        " letters, digits, dots, dashes and underscores"));
  }

  static bool IsName(const Json& value) {
    if (!value.is_string()) return false;
    const auto& name = value.get_ref<const std::string&>();
    return !name.empty() && name.size() <= kNameBytesMax &&
           std::none_of(name.begin(), name.end(), [](char c) { return absl::ascii_iscntrl(c); });
  }

  const ConfigKey& key_;
  const Json& value_;
  ConfigProblems* problems_;
};

struct Writer {
  const ConfigKey& key;
  Json operator()(Rates* rates) const {
    return rates->per_group ? Json(rates->values) : Json(rates->values[0]);
  }
  Json operator()(std::optional<Rates>* rates) const {
    return rates->has_value() ? (*this)(&**rates) : Json(nullptr);
  }
  Json operator()(std::optional<Words>* words) const {
    return words->has_value() ? Json(**words) : Json("auto");
  }
  template <class T>
  Json operator()(std::optional<T>* value) const {
    return value->has_value() ? Json(**value) : Json(nullptr);
  }
  Json operator()(GradientPlanChoice* plan) const {
    const size_t choice = static_cast<size_t>(*plan);
    CHECK_LT(choice, key.choices.size());
    return key.choices[choice];
  }
  Json operator()(Betas betas) const { return Json::array({*betas.first, *betas.second}); }
  template <class T>
  Json operator()(T* value) const {
    return Json(*value);
  }
};

}  // namespace

const std::vector<ConfigKey>& ConfigKeys() {
  static const auto& keys = *new std::vector<ConfigKey>([] {  // tidy: allow (never destroyed)
    std::vector<ConfigKey> all;
    AppendTopKeys(&all);
    AppendZeroKeys(&all);
    AppendOptimizerKeys(&all);
    AppendOtherKeys(&all);
    return all;
  }());
  return keys;
}

const ConfigKey* FindConfigKey(absl::string_view path) {
  for (const ConfigKey& key : ConfigKeys()) {
    if (path == key.path) return &key;
  }
  return nullptr;
}

bool IsConfigBlock(absl::string_view path) {
  const std::string prefix = absl::StrCat(path, ".");
  return std::any_of(ConfigKeys().begin(), ConfigKeys().end(), [&prefix](const ConfigKey& key) {
    return absl::StartsWith(key.path, prefix);
  });
}

void ReadKey(const ConfigKey& key, const Json& value, Config* config, ConfigProblems* problems) {
  std::visit(Reader(key, value, problems), key.slot(*config));
}

Json WriteKey(const ConfigKey& key, Config& config) {
  CHECK(key.slot != nullptr);
  return std::visit(Writer{key}, key.slot(config));
}

const Json& DefaultOf(const ConfigKey& key) {
  static const auto& defaults = *new std::map<std::string, Json>([] {  // tidy: allow (never destroyed)
    std::map<std::string, Json> all;
    Config config;
    for (const ConfigKey& each : ConfigKeys()) {
      if (each.slot != nullptr) all.emplace(each.path, WriteKey(each, config));
    }
    return all;
  }());
  return defaults.at(key.path);
}

bool IsOfType(const ConfigKey& key, const Config& config) {
  if (key.types.empty()) return true;
  const bool scheduler = absl::StartsWith(key.path, "scheduler.");
  return Contains(key.types, scheduler ? config.scheduler.type : config.optimizer.type);
}

bool IsIdentifier(absl::string_view name) {
  return !name.empty() && name.size() <= kIdentifierBytesMax && !absl::ascii_isdigit(name[0]) &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isalnum(c) || c == '_'; });
}

bool IsGatedOff(const ConfigKey& key, const Config& config) {
  return key.gate != nullptr && !key.gate->on(config);
}

bool HasSizeOfOne(const ConfigKey& key, const Json& value) {
  if (key.size == nullptr || !value.is_object() || !value.contains(key.size)) return false;
  return value[key.size] == 0 || value[key.size] == 1;
}

bool IsOff(const Json& value) {
  if (value.is_null() || value == false || value == 0 || value == "") return true;
  if (!value.is_structured()) return false;
  if (value.is_object() && value.contains("enabled")) return IsOff(value["enabled"]);
  return std::all_of(value.begin(), value.end(), IsOff);
}

bool IsIdentity(const ConfigKey& key, const Json& value) {
  if (key.also != nullptr && value == Json::parse(key.also)) return true;
  return key.size != nullptr && value.is_object() && value.size() == 1 && HasSizeOfOne(key, value);
}

std::string AdviceForUnknownKey(absl::string_view block, const std::string& key) {
  if (absl::StrContains(key, '.')) {
    if (const std::string nested = NestedNearest(block, key); !nested.empty()) {
      return absl::StrCat("is not a known key, for a dot does not nest; did you mean ", nested,
                          "?");
    }
  }
  const Words elsewhere = KeysElsewhere(key);
  if (!elsewhere.empty() && elsewhere.size() <= 3) {
    return absl::StrCat("is not a key here; did you mean ", absl::StrJoin(elsewhere, " or "), "?");
  }
  const Words known = NamesWithin(block);
  const std::string nearest = NearestWord(key, known);
  if (nearest.empty()) {
    Words served;
    for (const std::string& name : known) {
      if (HasServed(JoinPath(block, name), Served::kWorksBetter)) served.push_back(name);
    }
    return absl::StrCat("is not a known key; the keys here are ",
                        absl::StrJoin(served.empty() ? known : served, ", "));
  }
  if (HasServed(JoinPath(block, nearest), Served::kNoMeaning)) {
    return absl::StrCat("is not a known key; did you mean ", Quoted(nearest), "?");
  }
  return absl::StrCat("is not a known key; the nearest is ", Quoted(nearest),
                      ", which is not served");
}

std::string Quoted(const std::string& word) { return absl::StrCat("\"", word, "\""); }

std::string AnyOf(const Words& words) {
  return absl::StrJoin(words, " or ", [](std::string* out, const std::string& word) {
    absl::StrAppend(out, Quoted(word));
  });
}

bool Contains(const Words& words, absl::string_view word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

}  // namespace zerod
