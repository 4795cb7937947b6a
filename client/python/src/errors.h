// SPDX-License-Identifier: Apache-2.0
//
// absl::Status as Python exceptions: ZerodError(RuntimeError), one subclass per canonical code.
#pragma once

#include <nanobind/nanobind.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace zerod::python {

// Adds the classes to the module.
void DefineErrors(nanobind::module_& m);

// Raises what `status` says; where a Python error is set already (Ctrl-C during a wait), that one.
// REQUIRES: the GIL, !status.ok().
[[noreturn]] void Raise(const absl::Status& status);

inline void Check(const absl::Status& status) {
  if (!status.ok()) Raise(status);
}

template <typename T>
T Take(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

}  // namespace zerod::python
