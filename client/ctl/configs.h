// SPDX-License-Identifier: Apache-2.0
//
// zerodctl's commands about configurations. They need no daemon.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/config_parse.h"

namespace zerod::ctl {

struct CheckConfigArguments {
  std::string file;
  uint32_t world = 1;
  std::vector<uint64_t> hidden_sizes;
  std::vector<std::string> values;  // "key=value"
  bool deepspeed = false;
};

// All problems, a line each, where there are any.
absl::StatusOr<ParsedConfig> ReadConfig(const CheckConfigArguments& arguments);

// Prints what the file comes to and where each value is from; all problems, a line each, otherwise.
absl::Status CheckConfig(const CheckConfigArguments& arguments, bool json);

// Prints the table of docs/config.md.
void PrintConfigKeys();

}  // namespace zerod::ctl
