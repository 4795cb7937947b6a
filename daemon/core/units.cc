// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/units.h"

#include <algorithm>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace zerod::core {

bool IsAncestorOrSelf(const std::string& ancestor, const std::string& path) {
  if (ancestor.empty()) return true;
  return path.size() >= ancestor.size() && path.compare(0, ancestor.size(), ancestor) == 0 &&
         (path.size() == ancestor.size() || path[ancestor.size()] == '.');
}

namespace {

// "a.b.c" -> "a.b"; "a" -> "".
std::string Parent(const std::string& path) {
  size_t dot = path.rfind('.');
  return dot == std::string::npos ? std::string() : path.substr(0, dot);
}

std::string CommonAncestor(std::string a, const std::string& b) {
  while (!IsAncestorOrSelf(a, b)) a = Parent(a);
  return a;
}

// Elements of containers whose parameterised children are all alike, two or more of them.
std::set<std::string> LikeSiblings(const ModelDescription& model) {
  std::set<std::string> with_parameters;  // modules that have parameters somewhere below
  for (const ParameterDescription& p : model.parameters) {
    for (std::string path : p.modules) {
      while (with_parameters.insert(path).second && !path.empty()) path = Parent(path);
    }
  }
  std::map<std::string, std::vector<const ModuleDescription*>> children;
  std::set<std::string> containers;
  for (const ModuleDescription& m : model.modules) {
    if (m.is_container) containers.insert(m.path);
    if (!m.path.empty() && with_parameters.count(m.path)) children[Parent(m.path)].push_back(&m);
  }
  std::set<std::string> boundaries;
  for (const std::string& c : containers) {
    const auto& kids = children[c];
    if (kids.size() < 2) continue;
    bool alike = std::all_of(kids.begin(), kids.end(),
                             [&](const ModuleDescription* k) { return k->type == kids[0]->type; });
    if (!alike) continue;
    for (const ModuleDescription* k : kids) boundaries.insert(k->path);
  }
  return boundaries;
}

// The innermost of `boundaries` around `path`, or null.
const std::string* Innermost(const std::set<std::string>& boundaries, std::string path) {
  for (;;) {
    auto it = boundaries.find(path);
    if (it != boundaries.end()) return &*it;
    if (path.empty()) return nullptr;
    path = Parent(path);
  }
}

// The outermost of `leaves` around `path`, or null.
const std::string* Outermost(const std::set<std::string>& leaves, std::string path) {
  const std::string* outermost = nullptr;
  for (;;) {
    auto it = leaves.find(path);
    if (it != leaves.end()) outermost = &*it;
    if (path.empty()) return outermost;
    path = Parent(path);
  }
}

absl::Status CheckModules(const ModelDescription& model,
                          const std::map<std::string, std::string>& overrides) {
  std::set<std::string> paths;
  for (const ModuleDescription& m : model.modules) {
    if (!paths.insert(m.path).second) {
      return absl::InvalidArgumentError(absl::StrCat("the module '", m.path, "' is listed twice"));
    }
    if (!m.path.empty() && !paths.count(Parent(m.path))) {
      return absl::InvalidArgumentError(
          absl::StrCat("the module '", m.path, "' comes before its parent"));
    }
  }
  if (!paths.count("")) {
    return absl::InvalidArgumentError("the list of modules lacks the root module ''");
  }
  for (const ParameterDescription& p : model.parameters) {
    if (p.modules.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the parameter '", p.name, "' names no module"));
    }
    for (const std::string& m : p.modules) {
      if (!paths.count(m)) {
        return absl::InvalidArgumentError(absl::StrCat("the parameter '", p.name,
                                                       "' names a module '", m,
                                                       "' that is not in the list of modules"));
      }
    }
  }
  for (const auto& [path, name] : overrides) {
    if (!paths.count(path)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "zerod.units names the module '", path, "', which the model does not have"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<UnitAssignment> AssignUnits(const ModelDescription& model,
                                           const std::map<std::string, std::string>& overrides) {
  RETURN_IF_ERROR(CheckModules(model, overrides));
  const std::set<std::string> siblings = LikeSiblings(model);
  std::set<std::string> leaves;
  for (const ModuleDescription& m : model.modules) {
    if (m.leaf) leaves.insert(m.path);
  }
  std::set<std::string> forced;
  std::map<std::string, std::string> home_of_name;  // override unit name -> module path
  for (const auto& [path, name] : overrides) {
    forced.insert(path);
    auto [it, fresh] = home_of_name.emplace(name, path);
    if (!fresh) it->second = CommonAncestor(it->second, path);
  }

  std::vector<std::string> home;  // per parameter
  for (const ParameterDescription& p : model.parameters) {
    std::string lca = p.modules[0];
    for (const std::string& m : p.modules) lca = CommonAncestor(lca, m);
    if (const std::string* f = Innermost(forced, lca)) {
      home.push_back(home_of_name[overrides.at(*f)]);
    } else if (const std::string* l = Outermost(leaves, lca)) {
      home.push_back(*l);
    } else if (const std::string* s = Innermost(siblings, lca)) {
      home.push_back(*s);
    } else {
      home.push_back(lca);
    }
  }

  UnitAssignment result;
  std::map<std::string, UnitIndex> index;
  const std::set<std::string> used(home.begin(), home.end());
  for (const ModuleDescription& m : model.modules) {
    if (!used.count(m.path)) continue;
    index[m.path] = static_cast<UnitIndex>(result.names.size());
    result.names.push_back(m.path);
  }
  for (const std::string& h : home) result.of.push_back(index.at(h));
  return result;
}

}  // namespace zerod::core
