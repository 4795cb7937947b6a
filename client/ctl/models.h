// SPDX-License-Identifier: Apache-2.0
//
// Models that zerodctl plan knows, described as a client describes them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "proto/zerod/v1/jobs.pb.h"

namespace zerod::ctl {

struct KnownModel {
  std::string name;
  v1::Model model;  // without a dtype, which is the configuration's
  uint64_t hidden_size = 0;
};

// "train_gpt" (examples/train_gpt.py with its defaults), and models that people know. NOT_FOUND
// lists all names.
absl::StatusOr<KnownModel> ModelByName(const std::string& name);
// `parameters` elements, at least 1, in blocks as of a transformer of that size.
KnownModel UniformModel(uint64_t parameters);
// "train_gpt, gpt2-124m, ...".
std::string ModelNames();

}  // namespace zerod::ctl
