// SPDX-License-Identifier: Apache-2.0
//
// Which module's gather brings which parameters. A unit is an element of a ModuleList or
// Sequential of like siblings, else the lowest module with parameters; a parameter that several
// modules use belongs to the unit of their lowest common ancestor. What lies in a leaf module
// belongs to the outermost one around it, and what `overrides` name comes before all.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/core/layout.h"

namespace zerod::core {

struct UnitAssignment {
  std::vector<std::string> names;    // module path per unit, in the order of named_modules()
  std::vector<UnitIndex> of;         // per parameter of the description
};

// Whether the module at `path` is the one at `ancestor` or lies below it; "" is the root.
bool IsAncestorOrSelf(const std::string& ancestor, const std::string& path);

absl::StatusOr<UnitAssignment> AssignUnits(const ModelDescription& model,
                                           const std::map<std::string, std::string>& overrides);

}  // namespace zerod::core
