// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/configs.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/config_parse.h"
#include "base/status.h"
#include "nlohmann/json.hpp"

namespace zerod::ctl {
namespace {

// JSON as it is, and a word as a string: 1e-4, true, cpu.
std::string AsJson(const std::string& value) {
  return nlohmann::json::accept(value) ? value : nlohmann::json(value).dump(
      -1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<ParseOptions> OptionsOf(const CheckConfigArguments& arguments) {
  ParseOptions options;
  options.world = arguments.world;
  options.unknown_top_keys_are_warnings = arguments.deepspeed;
  if (arguments.hidden_sizes.empty() && arguments.values.empty()) return options;
  AutoValues values;
  values.hidden_sizes = arguments.hidden_sizes;
  for (const std::string& pair : arguments.values) {
    const size_t equals = pair.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(absl::StrCat("--auto ", pair, " is not KEY=VALUE"));
    }
    values.values[pair.substr(0, equals)] = AsJson(pair.substr(equals + 1));
  }
  options.auto_values = std::move(values);
  return options;
}

}  // namespace

absl::StatusOr<ParsedConfig> ReadConfig(const CheckConfigArguments& arguments) {
  std::ifstream in(arguments.file);
  if (!in.good()) {
    return absl::NotFoundError(
        absl::StrCat("cannot read ", arguments.file, ": ", std::strerror(errno)));
  }
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  ASSIGN_OR_RETURN(const ParseOptions options, OptionsOf(arguments));
  return ParseConfig(text, options);
}

absl::Status CheckConfig(const CheckConfigArguments& arguments, bool json) {
  ASSIGN_OR_RETURN(const ParsedConfig parsed, ReadConfig(arguments));
  std::fputs((json ? DescribeConfigAsJson(parsed) : DescribeConfig(parsed)).c_str(), stdout);
  return absl::OkStatus();
}

void PrintConfigKeys() { std::fputs(ConfigKeysAsMarkdown().c_str(), stdout); }

}  // namespace zerod::ctl
